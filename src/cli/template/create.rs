//! `forkvm template create`.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use forkvm::agent::protocol::Exec;
use forkvm::engine::Family;
use forkvm::engine::saved::SaveTo;
use forkvm::linux::LinuxVm;
use forkvm::templates::{Draft, Template, Templates};
use forkvm::vmm::Kvm;
use forkvm::vmm::boot::Payload;
use forkvm::vmm::memory::{MAX_MIB, MIN_MIB};
use forkvm::{BootSpec, End, FamilyConfig, VsockSpec};
use forkvm_linux_image::Cache;
use indicatif::ProgressBar;
use serde_json::json;

use super::end_when_asked;
use crate::cli::disk_option::{self, DiskOption};
use crate::cli::errors::Usage;
use crate::cli::output::{Outcome, Output};
use crate::cli::run::vm_name;
use crate::cli::said::Said;
use crate::cli::stop::Stop;

const EXAMPLES: &str = "\
Examples:
  forkvm template create web                         of the image `minimal`, once its agent answers
  forkvm template create db --memory 512 --disk data.img,overlay -- /srv/warm-up
  forkvm template create mine --kernel vmlinux --initrd initramfs.cpio --cmdline 'console=ttyS0'
  forkvm fork web -n 8 -- sh -c 'echo I am $FORKVM_CLONE_ID'

The machine has forkvm's agent in it. PROGRAM runs in it before it is saved, and has to end with 0.
The template is $XDG_DATA_HOME/forkvm/templates/NAME (or in ~/.local/share), whole or not at all. Kernel and disks stay
where they are, and must stay as they are: a later fork names the file that does not.";

/// How many lines of a console are shown where a machine did not come up.
const LINES: usize = 20;

/// Options of `template create`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Create {
    /// Name of the template
    #[arg(value_parser = vm_name)]
    name: String,
    /// The image to boot, which `forkvm image build` made
    #[arg(long, default_value = "minimal")]
    image: String,
    /// Boot this ELF executable or Linux bzImage instead
    #[arg(long, value_name = "FILE", conflicts_with = "image")]
    kernel: Option<PathBuf>,
    /// Initial RAM disk of the kernel
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Option<PathBuf>,
    /// Command line of the kernel [default: the image's]
    #[arg(long, value_name = "TEXT")]
    cmdline: Option<String>,
    /// RAM in MiB
    #[arg(long, value_name = "MIB", default_value_t = 64,
          value_parser = clap::value_parser!(u64).range(MIN_MIB..=MAX_MIB))]
    memory: u64,
    /// vCPUs
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u32).range(1..=i64::from(forkvm::abi::MAX_VCPUS)))]
    vcpus: u32,
    /// A disk that is not written to; may be given up to 8 times
    #[arg(long = "disk", value_name = "FILE,ro|overlay[,name=NAME]")]
    disks: Vec<DiskOption>,
    /// How long the agent may take to answer, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    patience: u64,
    /// What to run in the machine before it is saved
    #[arg(last = true)]
    program: Vec<String>,
}

/// What is booted.
struct Kernel {
    kernel: PathBuf,
    initrd: Option<PathBuf>,
    cmdline: String,
}

impl Create {
    pub(crate) fn run(self, output: &Output) -> anyhow::Result<Outcome> {
        if self.disks.iter().any(DiskOption::is_written) {
            let text = "a disk of a template is not written to: add ,ro or ,overlay";
            return Err(Usage(text.into()).into());
        }
        let kernel = self.kernel()?;
        let draft = Templates::of_user()?.begin(&self.name)?;
        let sockets = tempfile::tempdir().context("making a directory for sockets")?;
        let console = Said::default();
        let family = Family::new(
            Arc::new(Kvm::open()?),
            FamilyConfig {
                consoles: Arc::new(console.clone()),
                saver: Some(Arc::new(SaveTo::exactly(draft.machine()))),
                vsock: Some(VsockSpec {
                    path: sockets.path().join("vsock"),
                }),
                ..FamilyConfig::default()
            },
        );
        let stop = Stop::on_signals().context("hearing signals")?;
        end_when_asked(&stop, &family).context("starting a thread")?;
        let made = self.make(&family, &kernel, draft);
        family.end();
        let error = match made {
            Ok(template) => {
                let (name, directory) = (template.name(), template.directory().display());
                writeln!(output.text(), "made {name} in {directory}")?;
                return Ok(Outcome::done(super::to_json(&template)));
            }
            Err(error) => error,
        };
        let said = console.text();
        let lines: Vec<&str> = said.lines().collect();
        let last = lines[lines.len().saturating_sub(LINES)..].join("\n  ");
        if stop.exit_code().is_none() && !last.is_empty() {
            eprintln!("forkvm: the machine's console ended with\n  {last}");
        }
        stop.outcome(error)
    }

    fn kernel(&self) -> anyhow::Result<Kernel> {
        if let Some(kernel) = &self.kernel {
            return Ok(Kernel {
                kernel: kernel.clone(),
                initrd: self.initrd.clone(),
                cmdline: self.cmdline.clone().unwrap_or_default(),
            });
        }
        let images = Cache::of_user()?.images()?;
        let named = images.iter().filter(|image| image.name() == self.image);
        let image = named.max_by_key(|image| image.used().ok());
        let image = image.with_context(|| {
            format!(
                "there is no image {0}: `forkvm image build {0}` makes it",
                self.image
            )
        })?;
        Ok(Kernel {
            kernel: image.vmlinux(),
            initrd: Some(image.initramfs()),
            cmdline: self
                .cmdline
                .clone()
                .unwrap_or_else(|| image.cmdline().to_owned()),
        })
    }

    fn make(
        &self,
        family: &Arc<Family>,
        kernel: &Kernel,
        draft: Draft,
    ) -> anyhow::Result<Template> {
        let start = Instant::now();
        let spinner = Spinner::new();
        spinner.say("booting");
        let vm = family.boot(BootSpec {
            name: self.name.clone(),
            memory_mib: self.memory,
            vcpus: self.vcpus,
            disks: disk_option::open_all(&self.disks)?,
            payload: Payload::Kernel {
                kernel: kernel.kernel.clone(),
                initrd: kernel.initrd.clone(),
            },
            cmdline: kernel.cmdline.clone(),
        });
        let vm = vm.context("booting the machine")?;
        let patience = Duration::from_secs(self.patience);
        let vm = LinuxVm::meet(family.clone(), vm, patience)?;
        let boot_ms = millis(start);
        if !self.program.is_empty() {
            spinner.say("running the program");
            self.warm_up(&vm)?;
        }
        spinner.say("saving");
        vm.member().save().context("saving the machine")?;
        let end = vm.join().end;
        anyhow::ensure!(end == End::Saved, "the machine {end} as it was saved");
        spinner.say("hashing");
        let disks = self.disks.iter().map(|disk| disk.path().to_owned());
        let files = [Some(kernel.kernel.clone()), kernel.initrd.clone()].into_iter();
        let files: Vec<PathBuf> = files.flatten().chain(disks).collect();
        let about = json!({
            "kernel": kernel.kernel,
            "cmdline": kernel.cmdline,
            "memory_mib": self.memory,
            "vcpus": self.vcpus,
            "program": self.program,
            "boot_ms": boot_ms,
            "template_ms": millis(start),
        });
        Ok(draft.finish(about, &files)?)
    }

    fn warm_up(&self, vm: &LinuxVm) -> anyhow::Result<()> {
        let program = Exec {
            argv: self
                .program
                .iter()
                .map(|word| word.as_str().into())
                .collect(),
            ..Exec::default()
        };
        let what = || format!("running {:?} in the machine", self.program);
        let running = vm.agent().exec(&program).with_context(what)?;
        let ended = running.pump(None, &mut std::io::stderr(), &mut std::io::stderr());
        let status = ended.with_context(what)?.status();
        anyhow::ensure!(
            status == 0,
            "{:?} ended with {status} in the machine",
            self.program
        );
        Ok(())
    }
}

fn millis(start: Instant) -> u64 {
    start.elapsed().as_millis() as u64
}

/// Says on a terminal what is under way. Gone when it is dropped.
struct Spinner(ProgressBar);

impl Spinner {
    fn new() -> Spinner {
        let bar = if std::io::stderr().is_terminal() {
            ProgressBar::new_spinner()
        } else {
            ProgressBar::hidden()
        };
        bar.enable_steady_tick(Duration::from_millis(100));
        Spinner(bar)
    }

    fn say(&self, what: &'static str) {
        self.0.set_message(what);
    }
}

impl Drop for Spinner {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
