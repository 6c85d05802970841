//! userfaultfd in kernel mode: what lazy memory will need.
#![allow(unsafe_code)] // userfaultfd(2) has no wrapper among this crate's dependencies.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use super::limits::number;
use super::{Check, Lack};

const DEVICE: &str = "/dev/userfaultfd";
const SYSCTL: &str = "/proc/sys/vm/unprivileged_userfaultfd";

pub(super) fn check() -> Check {
    let needed_for = "lazy memory, a later version; cow works without it and without root";
    Check::new("userfaultfd", false, needed_for, find())
}

/// KVM touches guest memory in kernel mode, which a userfaultfd for user mode only does not serve.
fn find() -> Result<String, Lack> {
    let device = OpenOptions::new().read(true).write(true).open(DEVICE);
    if device.is_ok() {
        return Ok(format!("{DEVICE} may be opened"));
    }
    let setting = number(SYSCTL).map_or("absent".into(), |value| value.to_string());
    match kernel_mode() {
        Ok(_closed_at_once) => Ok(format!(
            "kernel mode by system call, vm.unprivileged_userfaultfd = {setting}"
        )),
        Err(error) => {
            let device = if fs::exists(DEVICE).unwrap_or(false) {
                "denied"
            } else {
                "absent"
            };
            Err(Lack::new(
                format!("{error}; {DEVICE} {device}, vm.unprivileged_userfaultfd = {setting}"),
                format!(
                    "run as root, or give this user {DEVICE} (Linux 6.1), or \
                     `sudo sysctl vm.unprivileged_userfaultfd=1`"
                ),
            ))
        }
    }
}

fn kernel_mode() -> io::Result<OwnedFd> {
    // SAFETY: the call takes flags only and touches no memory.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so `fd` is a descriptor that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
