//! The embedded guest runs on another hypervisor as well: QEMU boots it by its PVH note.

use std::fs;
use std::io::ErrorKind;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use forkvm_guest_images::{BARE, JOBS};

const LIMIT: Duration = Duration::from_secs(60);

/// What the guest printed, and its exit status; `None` (and the reason printed) without QEMU.
fn boot(name: &str, memory_mib: u32, command_line: &str) -> Option<(String, i32)> {
    let directory = std::path::Path::new(env!("CARGO_TARGET_TMPDIR"));
    let [kernel, console] =
        ["elf", "txt"].map(|kind| directory.join(format!("qemu-{name}.{kind}")));
    fs::write(&kernel, BARE).unwrap();
    let started = Command::new("qemu-system-x86_64")
        .args([
            "-M",
            "microvm,rtc=off,acpi=off",
            "-accel",
            "tcg",
            "-cpu",
            "max",
            "-smp",
            "1",
        ])
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"])
        .arg("-serial")
        .arg(format!("file:{}", console.display()))
        .args([
            "-m",
            &memory_mib.to_string(),
            "-append",
            command_line,
            "-kernel",
        ])
        .arg(&kernel)
        .stdin(Stdio::null())
        .spawn();
    let mut qemu = match started {
        Ok(qemu) => qemu,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            println!("skipped: qemu-system-x86_64 is not installed (package qemu-system-x86)");
            return None;
        }
        Err(error) => panic!("qemu-system-x86_64 cannot be started: {error}"),
    };
    let start = Instant::now();
    let status = loop {
        match qemu.try_wait().unwrap() {
            Some(status) => break status,
            None if start.elapsed() < LIMIT => sleep(Duration::from_millis(20)),
            None => {
                qemu.kill().unwrap();
                panic!(
                    "no end; console:\n{}",
                    fs::read_to_string(&console).unwrap()
                );
            }
        }
    };
    // isa-debug-exit: QEMU's status is twice what was written, plus one.
    let code = status.code().expect("QEMU was not ended by a signal");
    assert_eq!(code & 1, 1, "QEMU itself failed: {status}");
    Some((fs::read_to_string(&console).unwrap(), code >> 1))
}

#[test]
fn hello_ends_with_status_0() {
    if let Some((console, status)) = boot("hello", 128, "job=hello") {
        assert!(
            console.contains("hello from 1 vCPUs and 128 MiB"),
            "{console}"
        );
        assert_eq!(status, 0);
    }
}

#[test]
fn ram_above_4_gib_is_found() {
    if let Some((console, status)) = boot("high", 6144, "job=hello") {
        assert!(console.contains("and 6144 MiB"), "{console}");
        assert_eq!(status, 0);
    }
}

#[test]
fn a_job_that_forks_ends_with_status_3_where_there_is_no_doorbell() {
    if let Some((console, status)) = boot("fork", 128, "job=fork n=2") {
        assert!(console.contains("no fork doorbell"), "{console}");
        assert_eq!(status, 3);
    }
}

#[test]
fn an_unknown_job_ends_with_status_2_and_the_list_of_jobs_that_the_host_has() {
    if let Some((console, status)) = boot("unknown", 128, "job=nonsense") {
        let listed: Vec<&str> = console
            .lines()
            .filter_map(|line| line.strip_prefix("  "))
            .collect();
        let known: Vec<&str> = JOBS.iter().map(|job| job.name).collect();
        assert_eq!(listed, known);
        assert_eq!(status, 2);
    }
}
