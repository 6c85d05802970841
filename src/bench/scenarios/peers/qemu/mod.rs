//! QEMU: the same guest, saved to a file and restored from it.
//!
//! Machine type microvm, KVM, the same RAM and CPU; the guest is booted by its PVH note. QEMU has no
//! fork doorbell, so the guest tells on its console how far it is. It is saved halted, with a byte for
//! it in the UART whose interrupt is pending: restored, it takes that interrupt first, as a clone of
//! forkvm takes the one that tells it of the fork. Its work done, it ends itself. The first action is the first byte on the console.
//!
//! Everything is handed over by open descriptor, and files have no name: there is nothing to clean up
//! but processes ([`process`]). What is said to QEMU is [`qmp`]'s.

mod process;
mod qmp;

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::bench::measure::{BenchError, Version, call};
use crate::bench::subject::SubjectSpec;

use super::Peer;
use process::{Qemu, Start};
use qmp::Monitor;

/// Far beyond what a start takes on a slow host.
const DEADLINE: Duration = Duration::from_secs(30);

/// Longest text on a console that is waited for something in.
const CONSOLE: usize = 4096;

/// See the module's text.
#[derive(Default)]
pub(super) struct Restore {
    saved: Option<Saved>,
}

/// A VM that QEMU has saved.
struct Saved {
    program: PathBuf,
    version: Version,
    /// What it booted, which QEMU reads again at each start.
    kernel: File,
    state: File,
}

impl Peer for Restore {
    fn name(&self) -> &'static str {
        "qemu/restore"
    }

    fn prepare(&mut self) -> Result<(), BenchError> {
        let program = process::find()?;
        // Whether QEMU can run this guest with this KVM shows when it is tried.
        let saved = Saved::boot_and_save(program).and_then(|saved| {
            saved.restore()?;
            Ok(saved)
        });
        self.saved = Some(saved.map_err(|error| {
            let why = format!("QEMU does not restore this guest with KVM here: {error}");
            BenchError::Lacks(why)
        })?);
        Ok(())
    }

    fn version(&self) -> Option<&Version> {
        self.saved.as_ref().map(|saved| &saved.version)
    }

    fn start(&mut self) -> Result<Duration, BenchError> {
        match &self.saved {
            Some(saved) => saved.restore().map_err(call("a restore by QEMU")),
            None => Ok(Duration::ZERO),
        }
    }
}

impl Saved {
    /// Boots the guest, brings it where it is halted with a byte waiting, and saves it.
    fn boot_and_save(program: PathBuf) -> io::Result<Saved> {
        let mut kernel = tempfile::tempfile()?;
        kernel.write_all(forkvm_guest_images::BARE)?;
        let state = tempfile::tempfile()?;
        let (mut console, its_console) = UnixStream::pair()?;
        let (monitor, its_monitor) = UnixStream::pair()?;
        let qemu = Qemu::start(Start {
            program: &program,
            kernel: &kernel,
            cmdline: &cmdline(),
            more: &[
                "-chardev",
                "socket,id=monitor,fd=0",
                "-mon",
                "chardev=monitor,mode=control",
                // The VM is stopped when it is saved, and is to run as soon as it is restored.
                "-global",
                "migration.store-global-state=off",
            ],
            input: OwnedFd::from(its_monitor).into(),
            console: its_console,
            dies_with_us: true,
        })?;
        let done = (|| {
            let mut monitor = Monitor::connect(monitor, DEADLINE)?;
            wait(&mut console, "READY\n")?;
            monitor.stop()?;
            // Work, and then the end. More than a byte its UART does not take ahead of the guest.
            console.write_all(b"e")?;
            monitor.pass_main_loop()?;
            monitor.save_to(&state, DEADLINE)
        })();
        done.map_err(|error| qemu.explain(error))?;
        Ok(Saved {
            version: Version {
                of: "qemu",
                text: process::version(&program)?,
            },
            program,
            kernel,
            state,
        })
    }

    /// Restores it once and waits for its end; how long it took to the first byte of its console.
    fn restore(&self) -> io::Result<Duration> {
        let mut state = self.state.try_clone()?;
        state.rewind()?;
        let (mut console, its_console) = UnixStream::pair()?;
        console.set_read_timeout(Some(DEADLINE))?;
        let asked = Instant::now();
        let mut qemu = Qemu::start(Start {
            program: &self.program,
            kernel: &self.kernel,
            cmdline: &cmdline(),
            more: &["-incoming", "fd:0"],
            input: state.into(),
            console: its_console,
            dies_with_us: false,
        })?;
        let mut first = [0];
        let acted = console.read_exact(&mut first);
        let took = asked.elapsed();
        acted
            .and_then(|()| wait(&mut console, "ANSWER\n"))
            .map_err(|error| qemu.explain(error))?;
        qemu.wait(DEADLINE)?;
        Ok(took)
    }
}

fn cmdline() -> String {
    SubjectSpec::USUAL.cmdline()
}

/// Reads the console until it ends in `due`.
fn wait(console: &mut UnixStream, due: &str) -> io::Result<()> {
    console.set_read_timeout(Some(DEADLINE))?;
    let mut heard = Vec::new();
    let mut byte = [0];
    while !heard.ends_with(due.as_bytes()) {
        if heard.len() == CONSOLE || console.read(&mut byte)? == 0 {
            let heard = String::from_utf8_lossy(&heard);
            let what = format!("the guest's console said {heard:?} and not {due:?}");
            return Err(io::Error::other(what));
        }
        heard.push(byte[0]);
    }
    Ok(())
}
