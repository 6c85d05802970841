//! `forkvm run`: boots a VM.

use std::io::{self, IsTerminal, Write};

use anyhow::Context;
use clap::Args;
use comfy_table::{Table, presets};
use forkvm::vmm::memory::{MAX_MIB, MIN_MIB};
use forkvm::{BootSpec, ConsoleDevice, guest};
use forkvm_guest_images::JOBS;
use serde_json::json;

use super::control::place::Claim;
use super::disk_option::{self, DiskOption};
use super::errors::Usage;
use super::kernel_options::KernelOptions;
use super::output::{Outcome, Output};
use super::session::{Session, SessionOptions};

const EXAMPLES: &str = "\
Examples:
  forkvm run --guest hello
  forkvm run --guest fork --cmdline 'n=3 mib=4' --memory 64 --vcpus 2
  forkvm run --image minimal --memory 128 --name web
  forkvm run --kernel bzImage --rootfs root.img,overlay --cmdline 'console=ttyS0' \\
             --memory 1024 --disk data.img,name=data
  forkvm run --guest 'tree depth=3' --memory-mode lazy
  forkvm run --guest 'touch mib=64' --save DIR     # Ctrl-C saves; `forkvm restore DIR` goes on

Disks:
  FILE is a raw image; nothing else is supported, and a format is never guessed.
  ro          the guest may not write
  overlay     the guest writes to memory, the file stays as it is (QEMU's snapshot=on)
  name=NAME   what the guest reads as the disk's serial number [default: d0, d1, ...]
  Without ro and overlay the file is written. If the VM forks then, the file becomes the frozen base
  of all, and the VM goes on in FILE.overlay-1, until `forkvm disk commit FILE` merges it.

Ctrl-C and SIGTERM end the clones, the deepest first, then the VM; with --save the VM is saved.
A second one ends everything at once. With a kernel on a terminal all keys go to the guest, Ctrl-C
too, and Ctrl-] does what Ctrl-C does elsewhere. Clones run on when the VM has ended; the command waits for
them, and ends with the VM's own status.";

/// Options of `run`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
#[group(id = "payload", required = true, multiple = false, args = ["guest", "image", "kernel"])]
pub(crate) struct Run {
    /// Boot the embedded guest with a job, such as `hello` or `fork n=3`; `help` lists them
    #[arg(long, value_name = "JOB", conflicts_with_all = ["initrd", "rootfs", "append"])]
    guest: Option<String>,
    #[command(flatten)]
    kernel: KernelOptions,
    /// RAM in MiB
    #[arg(long, value_name = "MIB", default_value_t = 512,
          value_parser = clap::value_parser!(u64).range(MIN_MIB..=MAX_MIB))]
    memory: u64,
    /// vCPUs
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u32).range(1..=i64::from(forkvm::abi::MAX_VCPUS)))]
    vcpus: u32,
    /// A disk; may be given up to 8 times
    #[arg(
        long = "disk",
        value_name = "FILE[,ro][,overlay][,format=raw][,name=NAME]"
    )]
    disks: Vec<DiskOption>,
    /// Name of the VM, by which `forkvm ps`, `info`, `fork` and others find it while it runs; its clones are
    /// NAME.1, NAME.2, ... [default: vm, which is not to be found]
    #[arg(long, value_parser = vm_name)]
    name: Option<String>,
    #[command(flatten)]
    session: SessionOptions,
}

impl Run {
    pub(crate) fn run(self, output: &Output) -> anyhow::Result<Outcome> {
        if self.guest.as_deref() == Some("help") {
            return list_jobs(output);
        }
        self.session.forks.check()?;
        let claim = self.name.as_deref().map(Claim::take).transpose()?;
        let mut options = self.session;
        if let (Some(claim), None) = (&claim, &self.guest) {
            options.vsock_is_by_default(claim.vsock());
        }
        // What the embedded guest reads are lines, which a terminal lets its user edit.
        let raw = self.guest.is_none() && io::stdin().is_terminal() && io::stdout().is_terminal();
        let (payload, cmdline, console, disks) = match self.guest {
            Some(job) => {
                let cmdline = job_line(&job, self.kernel.cmdline())?;
                (guest::bare(), cmdline, ConsoleDevice::Serial, self.disks)
            }
            None => {
                let kernel = self.kernel.find()?;
                let disks = kernel.disks(&self.disks);
                (kernel.payload(), kernel.cmdline, kernel.console, disks)
            }
        };
        let spec = BootSpec {
            name: self.name.unwrap_or_else(|| "vm".into()),
            memory_mib: self.memory,
            vcpus: self.vcpus,
            disks: disk_option::open_all(&disks)?,
            payload,
            cmdline,
            console,
        };
        let session = Session::new(options, output, claim)?;
        let what = format!("booting {}", spec.name);
        let vm = session.family().boot(spec).context(what)?;
        session.serve(vm, raw)
    }
}

/// The embedded guest's command line for `job`, which may carry arguments.
fn job_line(job: &str, cmdline: &str) -> Result<String, Usage> {
    let name = job.split_whitespace().next().unwrap_or_default();
    if JOBS.iter().all(|known| known.name != name) {
        let names: Vec<&str> = JOBS.iter().map(|known| known.name).collect();
        return Err(Usage(format!(
            "there is no job {name:?}, only {}",
            names.join(", ")
        )));
    }
    Ok(format!("job={job} {cmdline}").trim_end().to_owned())
}

fn list_jobs(output: &Output) -> anyhow::Result<Outcome> {
    let mut table = Table::new();
    table
        .load_preset(presets::NOTHING)
        .set_header(["job", "arguments", "what it does"]);
    for job in JOBS {
        table.add_row([job.name, job.arguments, job.about]);
    }
    writeln!(output.text(), "{table}")?;
    let names: Vec<&str> = JOBS.iter().map(|job| job.name).collect();
    Ok(Outcome::done(json!({ "jobs": names })))
}

/// Names become part of file names and of the clones' names.
pub(super) fn vm_name(text: &str) -> Result<String, String> {
    let plain = text.bytes().all(disk_option::is_plain) && !text.starts_with('.');
    if text.is_empty() || !plain {
        return Err("a name is made of letters, digits and .-_, and begins with no dot".into());
    }
    Ok(text.to_owned())
}
