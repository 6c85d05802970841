//! The kernel's source: an archive that tar and xz unpack.

use std::fs::File;
use std::io::Seek;
use std::path::Path;

use super::command::{self, Runner};
use super::{KernelError, failed};
use crate::recipe::KernelLayout;
use crate::watch::{Step, Watch};

/// Unpacks the source that `layout` names into `work`, without the directory that all of it lies in.
pub(super) fn unpack(
    layout: &KernelLayout,
    work: &Path,
    runner: &Runner,
    watch: &mut dyn Watch,
) -> Result<(), KernelError> {
    let path = &layout.source;
    let mut archive = File::open(path).map_err(failed("opening", path))?;
    let len = archive.metadata().map_err(failed("reading", path))?.len();
    let mut tar = command::new("tar", work);
    tar.args([
        "--extract",
        "--xz",
        "--strip-components=1",
        "--wildcards",
        "--wildcards-match-slash",
        "--no-same-owner",
        // A line now and then: if forkvm is killed, tar ends when nobody reads it.
        "--checkpoint=500",
    ]);
    for pattern in &layout.leave_out {
        tar.arg(format!("--exclude=*/{pattern}"));
    }
    // tar reads through a copy of this descriptor, and moves the place that both have in the file.
    tar.args(["--file", "-"])
        .stdin(archive.try_clone().map_err(failed("reading", path))?);
    watch.at(Step::Unpacking, 0, len);
    runner.run(tar, watch, |watch, _| {
        let done = archive.stream_position().unwrap_or(0);
        watch.at(Step::Unpacking, done, len);
    })
}
