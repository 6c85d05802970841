//! A process of QEMU: how it is found, started and ended.
//!
//! It ends with its handle. Should this process be killed without a chance to end it, the kernel does
//! where [`Start::dies_with_us`] was said; a VM that is restored ends itself after its work.
#![allow(unsafe_code)] // A child that is to die with its parent says so before its exec.

use std::env;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::bench::measure::BenchError;
use crate::bench::subject::SubjectSpec;

const NAME: &str = "qemu-system-x86_64";

/// QEMU's program.
pub(super) fn find() -> Result<PathBuf, BenchError> {
    let path = env::var_os("PATH").unwrap_or_default();
    let here = |dir: PathBuf| dir.join(NAME);
    let found = env::split_paths(&path)
        .map(here)
        .find(|file| file.is_file());
    found.ok_or_else(|| {
        let why = format!("{NAME} is not in PATH; install it: apt-get install qemu-system-x86");
        BenchError::Lacks(why)
    })
}

/// What it says of its version, such as `7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)`.
pub(super) fn version(program: &Path) -> io::Result<String> {
    let output = Command::new(program).arg("--version").output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    let first = said.lines().next().unwrap_or_default();
    let (_name, version) = first.split_once("version ").ok_or_else(|| {
        let tried = program.display();
        io::Error::other(format!("{tried} --version says no version: {first:?}"))
    })?;
    Ok(version.trim().to_owned())
}

/// What is started.
pub(super) struct Start<'a> {
    pub(super) program: &'a Path,
    pub(super) kernel: &'a File,
    pub(super) cmdline: &'a str,
    /// Further options.
    pub(super) more: &'a [&'a str],
    /// Its descriptor 0.
    pub(super) input: Stdio,
    /// The guest's UART, its descriptor 1.
    pub(super) console: UnixStream,
    /// Whether the kernel ends it when this thread ends. Not for what is measured: such a child is
    /// made by fork(), which copies page tables of this process.
    pub(super) dies_with_us: bool,
}

/// A process of QEMU, killed when it is dropped.
pub(super) struct Qemu {
    child: Child,
    /// What it says of errors.
    words: File,
}

impl Qemu {
    pub(super) fn start(start: Start<'_>) -> io::Result<Qemu> {
        let words = tempfile::tempfile()?;
        let SubjectSpec {
            memory_mib, vcpus, ..
        } = SubjectSpec::USUAL;
        let mut command = Command::new(start.program);
        command
            .args(["-no-user-config", "-nodefaults", "-display", "none"])
            .args(["-M", MACHINE, "-accel", "kvm", "-cpu", CPU])
            .args(["-m", &memory_mib.to_string(), "-smp", &vcpus.to_string()])
            .args(["-chardev", "socket,id=console,fd=1"])
            .args(["-serial", "chardev:console"])
            // Where the guest ends its machine.
            .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"])
            .args(["-kernel", &path_of(start.kernel)])
            .args(["-append", start.cmdline])
            .args(start.more)
            .stdin(start.input)
            .stdout(OwnedFd::from(start.console))
            .stderr(words.try_clone()?)
            // Ctrl-C is for the benchmark, which ends after the repetition that is under way.
            .process_group(0);
        if start.dies_with_us {
            // SAFETY: one system call, which needs no lock and no memory of the parent's.
            unsafe { command.pre_exec(die_with_parent) };
        }
        let child = command.spawn()?;
        Ok(Qemu { child, words })
    }

    /// Waits until it has ended by itself.
    pub(super) fn wait(&mut self, deadline: Duration) -> io::Result<()> {
        let begun = Instant::now();
        while self.child.try_wait()?.is_none() {
            if begun.elapsed() > deadline {
                return Err(io::Error::other("QEMU did not end with its guest"));
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// `error`, with what QEMU has to say of it.
    pub(super) fn explain(&self, error: io::Error) -> io::Error {
        let mut said = String::new();
        let mut words = &self.words;
        let read = words
            .rewind()
            .and_then(|()| words.read_to_string(&mut said));
        match (read, said.trim()) {
            (Ok(_), "") | (Err(_), _) => error,
            (Ok(_), said) => io::Error::other(format!("{error}; QEMU said: {said}")),
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // Of a process that has ended both are told again how.
        let ended = self.child.kill().and_then(|()| self.child.wait());
        if let Err(error) = ended {
            tracing::warn!(%error, pid = self.child.id(), "a process of QEMU stays");
        }
    }
}

/// No device but what the guest uses: UART, interrupt controllers, and QEMU's exit device.
const MACHINE: &str = "microvm,acpi=off,pit=off,pic=off,rtc=off,auto-kernel-cmdline=off";

/// The host's. Without the MSR 0x10a, which kvm-pvm lists and then refuses to be set, on hosts of AMD at least: QEMU
/// aborts at that.
const CPU: &str = "host,arch-capabilities=off";

/// A name for a file that has none, as long as this process holds it.
pub(super) fn path_of(file: &File) -> String {
    format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd())
}

fn die_with_parent() -> io::Result<()> {
    // SAFETY: takes numbers only.
    match unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
