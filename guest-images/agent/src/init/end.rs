//! The end of a machine: its programs, its disks, itself.

use std::thread;

use rustix::fs::sync;
use rustix::mount::{MountFlags, UnmountFlags, mount_remount, unmount};
use rustix::process::Signal;
use rustix::system::{RebootCommand, reboot};

use super::mounts;
use crate::agent::{Agent, Last};
use crate::log;
use crate::reaper::{MERCY, wait_until_childless};

/// Ends the machine in order.
pub(super) fn machine(agent: Option<&Agent>, last: Last) -> ! {
    end_programs();
    sync();
    leave_disks();
    if let Some(agent) = agent {
        agent.doorbell().exit(last.status());
    }
    // Without an exit device a virtual machine that restarts has ended; its host may take that for a fault.
    if let Err(error) = reboot(RebootCommand::Restart) {
        log::line(&format!("restarting the machine: {error}"));
    }
    loop {
        thread::park();
    }
}

/// SIGTERM to all, SIGKILL to those that are there after [`MERCY`].
fn end_programs() {
    signal_all(Signal::TERM);
    // A stopped process hears it only when it goes on.
    signal_all(Signal::CONT);
    if !wait_until_childless(MERCY) {
        signal_all(Signal::KILL);
        if !wait_until_childless(MERCY) {
            log::line("some programs outlive SIGKILL: they wait for a device");
        }
    }
}

/// To every process but this one, which is PID 1.
fn signal_all(signal: Signal) {
    match kill_all::send(signal) {
        Err(error) if error.raw_os_error() != Some(libc::ESRCH) => {
            log::line(&format!(
                "sending signal {} to all: {error}",
                signal.as_raw()
            ));
        }
        _ => {}
    }
}

/// Unmounts what can be; the rest, the root first of all, becomes read-only, so that it is clean on its disk.
fn leave_disks() {
    for place in mounts::list().iter().rev() {
        if matches!(place.as_str(), "/proc" | "/sys" | "/dev") {
            continue;
        }
        let left = unmount(place.as_str(), UnmountFlags::empty())
            .or_else(|_| mount_remount(place.as_str(), MountFlags::RDONLY, ""));
        if let Err(error) = left
            && place != "/"
        {
            log::line(&format!("leaving {place}: {error}"));
        }
    }
}

mod kill_all {
    //! `kill(-1)`, which rustix does not offer: it has no process number for it.

    #![allow(unsafe_code)] // One call of the C library.

    use std::io;

    use rustix::process::Signal;

    pub(super) fn send(signal: Signal) -> io::Result<()> {
        // SAFETY: touches no memory of this process; PID 1 itself is left out by the kernel.
        match unsafe { libc::kill(-1, signal.as_raw()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}
