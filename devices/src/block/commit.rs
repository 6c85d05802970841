//! Merges the overlays of a forked disk back into its base, so that the disk can be written again.
//!
//! A disk whose VM was forked several times has one overlay per fork, each over the one before it;
//! the mark names them from the lowest to the topmost, which is the order of the merge.
//!
//! Called by `forkvm disk commit`, when no VM needs the base any more. It may be killed at any time:
//! the same command then finishes. Merging only copies from the overlays, so it can be repeated; the
//! mark is set to *merged* once the base holds everything durably, before an overlay is removed;
//! the mark itself goes last.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::base_mark::{BaseMark, MarkError, Phase, lock_alone};
use super::overlay::{Overlay, OverlayError, open_files};
use super::presence_map::PresenceMap;
use super::sparse;

/// Bytes that are copied at a time.
const COPY_LEN: u64 = 1 << 20;

/// What [`commit`] did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommitReport {
    /// The overlays, now removed, from the lowest to the topmost.
    pub overlays: Vec<PathBuf>,
    /// Bytes of the base that were replaced by this run; 0 when an earlier run had merged them.
    pub merged_bytes: u64,
}

/// Merges the overlays over the raw disk `path` into it, and removes them and the mark. `progress` is
/// told the bytes done and the bytes in all. All overlays are opened, and with that locked, before
/// the first byte is merged.
pub fn commit(
    path: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<CommitReport, CommitError> {
    let io_error = |source| CommitError::Io {
        path: path.into(),
        source,
    };
    // Mark and overlays lie beside the file itself, see `RawFile::from_file`.
    let resolved = fs::canonicalize(path).map_err(io_error)?;
    let path = resolved.as_path();
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
    let mut merged_bytes = 0;
    if mark.phase == Phase::Frozen {
        let disk_len = base.metadata().map_err(io_error)?.len();
        let open = |overlay: &PathBuf| {
            open_files(overlay, disk_len).map_err(|error| match error {
                OverlayError::Missing { path: overlay } => CommitError::OverlayMissing {
                    overlay,
                    mark: BaseMark::path_of(path),
                },
                error => CommitError::Overlay(error),
            })
        };
        let opened = mark
            .overlays
            .iter()
            .map(open)
            .collect::<Result<Vec<_>, _>>()?;
        let total = opened.iter().map(|(_, present)| present.bytes()).sum();
        for (data, present) in &opened {
            let mut so_far = |done| progress(merged_bytes + done, total);
            merge(data, present, &base, disk_len, &mut so_far).map_err(io_error)?;
            merged_bytes += present.bytes();
        }
        base.sync_all().map_err(io_error)?;
        mark.phase = Phase::Merged;
        mark.store(path)?;
    }
    for overlay in &mark.overlays {
        Overlay::remove_files(overlay)?;
    }
    BaseMark::remove(path)?;
    Ok(CommitReport {
        overlays: mark.overlays,
        merged_bytes,
    })
}

/// Copies every present sector; runs of zeros become holes.
fn merge(
    data: &File,
    present: &PresenceMap,
    base: &File,
    disk_len: u64,
    progress: &mut dyn FnMut(u64),
) -> io::Result<()> {
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
            progress(done);
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
