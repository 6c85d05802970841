//! `forkvm template create`.

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use forkvm::agent::protocol::Exec;
use forkvm::engine::Family;
use forkvm::engine::saved::SaveTo;
use forkvm::linux::{LinuxVm, TemplateSpec, make_template};
use forkvm::templates::{Draft, Template, Templates};
use forkvm::vmm::Kvm;
use forkvm::vmm::memory::{MAX_MIB, MIN_MIB};
use forkvm::{BootSpec, FamilyConfig, VsockSpec};

use super::end_when_asked;
use crate::cli::disk_option::{self, DiskOption};
use crate::cli::errors::Usage;
use crate::cli::kernel_options::{Kernel, KernelOptions};
use crate::cli::output::{Outcome, Output};
use crate::cli::progress::Spinner;
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
    #[command(flatten)]
    kernel: KernelOptions,
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

impl Create {
    pub(crate) fn run(self, output: &Output) -> anyhow::Result<Outcome> {
        let kernel = self.kernel.find()?;
        let disks = kernel.disks(&self.disks);
        if disks.iter().any(DiskOption::is_written) {
            let text = "a disk of a template is not written to: add ,ro or ,overlay";
            return Err(Usage(text.into()).into());
        }
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
        let made = self.make(&family, &kernel, &disks, draft);
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

    fn make(
        &self,
        family: &Arc<Family>,
        kernel: &Kernel,
        disks: &[DiskOption],
        draft: Draft,
    ) -> anyhow::Result<Template> {
        let spinner = Spinner::new("booting");
        let spec = TemplateSpec {
            boot: BootSpec {
                name: self.name.clone(),
                memory_mib: self.memory,
                vcpus: self.vcpus,
                disks: disk_option::open_all(disks)?,
                payload: kernel.payload(),
                cmdline: kernel.cmdline.clone(),
                console: kernel.console,
            },
            disks: disks.iter().map(|disk| disk.path().to_owned()).collect(),
            patience: Duration::from_secs(self.patience),
            warmed_by: self.program.clone(),
        };
        let mut warm_up = |vm: &LinuxVm| Ok(self.warm_up(vm)?);
        let made = make_template(family, draft, spec, &mut warm_up, &mut |step| {
            spinner.say(step.as_str());
        });
        Ok(made?)
    }

    fn warm_up(&self, vm: &LinuxVm) -> anyhow::Result<()> {
        if self.program.is_empty() {
            return Ok(());
        }
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
