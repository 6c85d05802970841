//! Limits of the host: what bounds the number and size of VMs. None stops a small one.

use std::fs;

use forkvm::engine::limits;

use super::{Check, Lack};

/// The oldest kernel that forkvm is tested on.
const TESTED_KERNEL: (u32, u32) = (6, 1);
/// A clone takes a handful.
const FEW_FILES: u64 = 1024;
/// What the kernel allows by default.
const DEFAULT_MAPPINGS: u64 = 65_530;
/// Room for the demo: a parent of 512 MiB and 32 clones.
const DEMO_MIB: u64 = 1024;

pub(super) fn kernel() -> Check {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim();
    let mut numbers = release
        .split(['.', '-'])
        .map_while(|number| number.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let found = if version >= TESTED_KERNEL {
        Ok(format!("Linux {release}"))
    } else {
        Err(Lack::new(
            format!("Linux {release}"),
            "forkvm is tested on Linux 6.1 and newer",
        ))
    };
    Check::new("kernel", false, "what is tested", found)
}

pub(super) fn open_files() -> Check {
    let found = match limits::raise_nofile() {
        Ok(files) if files >= FEW_FILES => Ok(format!("{files} open files")),
        Ok(files) => Err(Lack::new(
            format!("{files} open files at most"),
            "raise the hard limit: `ulimit -Hn`, or LimitNOFILE= of the service",
        )),
        Err(error) => Err(Lack::new(error, "allow setrlimit in the sandbox")),
    };
    Check::new(
        "nofile",
        false,
        "many clones: each takes a few descriptors",
        found,
    )
}

pub(super) fn mappings() -> Check {
    let file = "/proc/sys/vm/max_map_count";
    let found = match number(file) {
        Some(count) if count >= DEFAULT_MAPPINGS => Ok(format!("vm.max_map_count = {count}")),
        Some(count) => Err(Lack::new(
            format!("vm.max_map_count = {count}"),
            format!("`sudo sysctl vm.max_map_count={DEFAULT_MAPPINGS}`"),
        )),
        None => Err(Lack::new(format!("{file} cannot be read"), "mount /proc")),
    };
    Check::new("max_map_count", false, "many clones in one process", found)
}

pub(super) fn memory() -> Check {
    let found = match limits::available_kib().map(|kib| kib / 1024) {
        Ok(mib) if mib >= DEMO_MIB => Ok(format!("{mib} MiB available")),
        Ok(mib) => Err(Lack::new(
            format!("{mib} MiB available (MemAvailable and the cgroup's limit)"),
            "end other programs, raise the cgroup's memory.max, or run smaller VMs",
        )),
        Err(error) => Err(Lack::new(error, "mount /proc")),
    };
    Check::new(
        "memory",
        false,
        "the demo's VM of 512 MiB and its clones",
        found,
    )
}

pub(super) fn number(file: &str) -> Option<u64> {
    fs::read_to_string(file).ok()?.trim().parse().ok()
}
