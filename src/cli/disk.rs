//! `forkvm disk`: disks that were forked.

use std::io::Write;
use std::path::PathBuf;

use clap::Subcommand;
use forkvm::devices::block::commit;
use serde_json::json;

use super::output::{Outcome, Output};
use super::progress::Progress;

const COMMIT: &str = "\
A disk that a VM wrote through to its file becomes the frozen base of all when the VM forks; the VM
goes on in an overlay beside it (FILE.overlay-1), and the disk is refused to every later VM that
would write it. Commit copies the overlay into FILE and removes it, once no VM needs the base any
more. It may be killed at any time: the same command then finishes.";

/// Subcommands of `disk`.
#[derive(Debug, Subcommand)]
pub(crate) enum Disk {
    /// Merge what a forked VM wrote into its disk, which can then be written again
    #[command(after_help = COMMIT)]
    Commit {
        /// The raw disk that was forked
        file: PathBuf,
    },
}

impl Disk {
    pub(crate) fn run(self, output: &Output) -> anyhow::Result<Outcome> {
        let Disk::Commit { file } = self;
        let mut bar = Progress::new("merging");
        let report = commit(&file, &mut |done, total| bar.update(done, total))?;
        drop(bar);
        let (overlays, merged_kib) = (report.overlays, report.merged_bytes / 1024);
        for overlay in &overlays {
            writeln!(
                output.text(),
                "merged {} into {}",
                overlay.display(),
                file.display()
            )?;
        }
        writeln!(output.text(), "{merged_kib} KiB replaced")?;
        Ok(Outcome::done(
            json!({ "disk": file, "overlays": overlays, "merged_kib": merged_kib }),
        ))
    }
}
