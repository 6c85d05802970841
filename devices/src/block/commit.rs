//! Merges the overlay of a forked disk back into its base, so that the disk can be written again.
//!
//! Called by `forkvm disk commit`, when no VM needs the base any more. It may be killed at any time:
//! the same command then finishes. Merging only copies from the overlay, so it can be repeated; the
//! mark is set to *merged* once the base holds everything durably, before the overlay is removed;
//! the mark itself goes last.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::base_mark::{BaseMark, MarkError, Phase, lock_alone};
use super::overlay::{Overlay, OverlayError, open_files};
use super::presence_map::PresenceMap;
use super::raw::list;
use super::sparse;

/// Bytes that are copied at a time.
const COPY_LEN: u64 = 1 << 20;

/// What [`commit`] did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommitReport {
    /// The overlay, now removed.
    pub overlay: PathBuf,
    /// Bytes of the base that were replaced by this run; 0 when an earlier run had merged them.
    pub merged_bytes: u64,
}

/// Merges the only overlay over the raw disk `path` into it, and removes the overlay and the mark.
/// `progress` is told the bytes done and the bytes in all.
pub fn commit(
    path: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<CommitReport, CommitError> {
    let io_error = |source| CommitError::Io {
        path: path.into(),
        source,
    };
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .map_err(io_error)?;
    let base = lock_alone(opened)
        .map_err(io_error)?
        .ok_or_else(|| CommitError::BaseInUse { path: path.into() })?;
    let mut mark =
        BaseMark::load(path)?.ok_or_else(|| CommitError::NotForked { path: path.into() })?;
    let overlay = match mark.overlays.as_slice() {
        [overlay] => overlay.clone(),
        overlays => {
            let (path, overlays) = (path.into(), overlays.to_vec());
            return Err(CommitError::NotOneOverlay { path, overlays });
        }
    };
    let mut merged_bytes = 0;
    if mark.phase == Phase::Frozen {
        let disk_len = base.metadata().map_err(io_error)?.len();
        let (data, present) = open_files(&overlay, disk_len).map_err(|error| match error {
            OverlayError::Missing { path: overlay } => CommitError::OverlayMissing {
                overlay,
                mark: BaseMark::path_of(path),
            },
            error => CommitError::Overlay(error),
        })?;
        merge(&data, &present, &base, disk_len, progress).map_err(io_error)?;
        base.sync_all().map_err(io_error)?;
        merged_bytes = present.bytes();
        mark.phase = Phase::Merged;
        mark.store(path)?;
    }
    Overlay::remove_files(&overlay)?;
    BaseMark::remove(path)?;
    Ok(CommitReport {
        overlay,
        merged_bytes,
    })
}

/// Copies every present sector; runs of zeros become holes.
fn merge(
    data: &File,
    present: &PresenceMap,
    base: &File,
    disk_len: u64,
    progress: &mut dyn FnMut(u64, u64),
) -> io::Result<()> {
    let total = present.bytes();
    let mut done = 0;
    let mut buffer = vec![0; COPY_LEN.min(disk_len) as usize];
    for (run, _) in present.runs(0..disk_len).filter(|(_, present)| *present) {
        let mut at = run.start;
        while at < run.end {
            let end = run.end.min(at + COPY_LEN);
            let part = &mut buffer[..(end - at) as usize];
            data.read_exact_at(part, at)?;
            if part.iter().all(|&byte| byte == 0) {
                sparse::punch_hole(base, at..end)?;
            } else {
                base.write_all_at(part, at)?;
            }
            done += end - at;
            progress(done, total);
            at = end;
        }
    }
    Ok(())
}

/// Why nothing was committed.
#[derive(Debug, Error)]
pub enum CommitError {
    /// There is nothing to merge.
    #[error("the disk {path} is not the base of a fork: there is nothing to commit")]
    NotForked {
        /// Path of the disk.
        path: PathBuf,
    },
    /// A VM or one of its clones reads it.
    #[error("the disk {path} is in use: end the VMs and clones that have it open first")]
    BaseInUse {
        /// Path of the disk.
        path: PathBuf,
    },
    /// Merging one would corrupt the others.
    #[error(
        "the disk {path} is the base of several overlays ({}): only a single one can be merged",
        list(.overlays)
    )]
    NotOneOverlay {
        /// Path of the disk.
        path: PathBuf,
        /// The overlays.
        overlays: Vec<PathBuf>,
    },
    /// The overlay is gone, and with it what was written since the fork.
    #[error(
        "the overlay {overlay} is missing: put it back, or give up all that was written since the \
         fork by removing {mark}"
    )]
    OverlayMissing {
        /// Path of the overlay.
        overlay: PathBuf,
        /// Path of the mark.
        mark: PathBuf,
    },
    /// The overlay cannot be used; a VM may have it open.
    #[error(transparent)]
    Overlay(#[from] OverlayError),
    /// The mark cannot be used.
    #[error(transparent)]
    Mark(#[from] MarkError),
    /// The file system failed.
    #[error("the disk {path} could not be opened, locked or merged into; the overlay is untouched")]
    Io {
        /// Path of the disk.
        path: PathBuf,
        /// What the file system said.
        source: io::Error,
    },
}
