//! `forkvm restore`: lets a saved VM run on.

use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use forkvm::engine::saved::OpenMachine;

use super::control::place::Claim;
use super::output::{Outcome, Output};
use super::progress::Progress;
use super::run::vm_name;
use super::session::{Session, SessionOptions};

const EXAMPLES: &str = "\
Examples:
  forkvm restore DIR
  forkvm restore DIR --name second --save DIR2
  forkvm restore DIR --memory-mode lazy --background off

DIR is not changed: it can be restored any number of times. Its disks have to be where and what they
were at the save; a disk that was written through to its file can go on only once, since the machine
that goes on changes it. The guest's clocks go on from the instant of the save.

With memory mode cow all memory is read and checked before the machine runs. With lazy it runs at
once: each 64 KiB are read, and held against their checksum, when they are first touched. What is
damaged ends the VM then, by name, and only if it is needed; DIR must not be changed meanwhile.";

/// Options of `restore`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Restore {
    /// Where the machine was saved
    dir: PathBuf,
    /// Name of the VM, by which `forkvm ps`, `info`, `fork` and others find it while it runs [default: the one
    /// that it had, by which they do not]
    #[arg(long, value_parser = vm_name)]
    name: Option<String>,
    #[command(flatten)]
    session: SessionOptions,
}

impl Restore {
    pub(crate) fn run(self, output: &Output) -> anyhow::Result<Outcome> {
        let what = || format!("restoring {}", self.dir.display());
        let mode = self.session.forks.memory_mode;
        self.session.forks.check()?;
        let claim = self.name.as_deref().map(Claim::take).transpose()?;
        let machine = OpenMachine::open(&self.dir).with_context(what)?;
        let mut options = self.session;
        if let Some(claim) = &claim
            && machine.config().with_context(what)?.vsock
        {
            options.vsock_is_by_default(claim.vsock());
        }
        let session = Session::new(options, output, claim)?;
        let mut bar = Progress::new("loading memory");
        let restored =
            session
                .family()
                .restore(machine, self.name.as_deref(), mode, &mut |progress| {
                    bar.update(progress.done, progress.total);
                });
        drop(bar);
        session.serve(restored.with_context(what)?, false)
    }
}
