//! The `host` object of JSON outputs: what a figure was measured on.

use std::fs;
use std::thread;

use forkvm_vmm::KvmFlavour;
use serde::Serialize;

/// See the module's text. What cannot be read is empty, or 0.
#[derive(Clone, Debug, Serialize)]
pub struct Host {
    /// KVM flavour: `pvm`, `vmx`, `svm` or `unknown`.
    pub kvm: &'static str,
    /// CPUs that this process may use.
    pub cpus: usize,
    /// Release of the kernel.
    pub kernel: String,
    /// Name of the first CPU.
    pub cpu_model: String,
    /// RAM in MiB.
    pub memory_mib: u64,
    /// Load average over one minute.
    pub load1: f64,
}

impl Host {
    /// This host, now.
    pub fn here() -> Host {
        Host {
            kvm: KvmFlavour::detect().as_str(),
            cpus: thread::available_parallelism().map_or(0, usize::from),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            cpu_model: value(&read("/proc/cpuinfo"), "model name").unwrap_or_default(),
            memory_mib: value(&read("/proc/meminfo"), "MemTotal")
                .and_then(|total| total.strip_suffix(" kB")?.parse::<u64>().ok())
                .map_or(0, |kib| kib / 1024),
            load1: Host::load1(),
        }
    }

    /// Load average over one minute, now.
    pub fn load1() -> f64 {
        read("/proc/loadavg")
            .split_whitespace()
            .next()
            .and_then(|load| load.parse().ok())
            .unwrap_or(0.0)
    }
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// The value behind the first line `key : value` of `text`.
fn value(text: &str, key: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let (found, value) = line.split_once(':')?;
        (found.trim() == key).then(|| value.trim().to_owned())
    })
}
