//! userfaultfd in kernel mode: what lazy memory needs, and who may have it.

use std::fs::{self, OpenOptions};

use forkvm::engine::check_userfaultfd;

use super::limits::number;
use super::{Check, Lack};

const DEVICE: &str = "/dev/userfaultfd";
const SYSCTL: &str = "/proc/sys/vm/unprivileged_userfaultfd";

pub(super) fn check() -> Check {
    let needed_for = "memory mode lazy, freezes write-protect and delta. Without it memory mode cow \
                      works: remap for the first fork of a booted VM, copy for every later one";
    Check::new("userfaultfd", false, needed_for, find())
}

/// KVM touches guest memory in kernel mode, which a userfaultfd for user mode only does not serve.
/// Where the device exists it alone decides; the system call is tried only where it does not.
fn find() -> Result<String, Lack> {
    let setting = match number(SYSCTL) {
        Some(value) => format!("vm.unprivileged_userfaultfd = {value}"),
        None => "no vm.unprivileged_userfaultfd".into(),
    };
    let exists = fs::exists(DEVICE).unwrap_or(false);
    match (check_userfaultfd(), exists) {
        (Ok(()), true) => Ok(format!("{DEVICE} may be opened")),
        (Ok(()), false) => Ok(format!("by system call; no {DEVICE}, {setting}")),
        (Err(error), exists) => {
            let why = format!("{:#}", anyhow::Error::from(error));
            let opened = OpenOptions::new().read(true).write(true).open(DEVICE);
            let (device, mend) = match (exists, opened) {
                (true, Err(error)) => (
                    format!("{DEVICE}: {error}"),
                    format!(
                        "run as root, or let this user read and write {DEVICE}: `sudo chgrp GROUP \
                         {DEVICE} && sudo chmod g+rw {DEVICE}`; where it exists it alone decides"
                    ),
                ),
                (true, Ok(_)) => (
                    format!("{DEVICE} may be opened"),
                    "use Linux 5.19 or newer with CONFIG_USERFAULTFD and write protection".into(),
                ),
                (false, _) => (
                    format!("no {DEVICE}"),
                    "run as root, or `sudo sysctl vm.unprivileged_userfaultfd=1`, or use Linux 6.1 \
                     or newer and let this user read and write /dev/userfaultfd"
                        .into(),
                ),
            };
            Err(Lack::new(format!("{why}; {device}; {setting}"), mend))
        }
    }
}
