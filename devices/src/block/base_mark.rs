//! The mark beside a raw disk that was forked: its file is now the frozen base of other disks.
//!
//! When a disk that is open for writing is forked, its clones and the VM itself go on in overlays,
//! and whoever wrote the file again would corrupt all of them. `<file>.forkvm-base` says so beyond
//! the life of the process, and names the overlays that have to be merged first (`commit`).

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::durable;
use super::raw::{Access, RawFile};

const VERSION: u32 = 1;

/// How often a lock that somebody else holds for a moment is tried again, and how long apart.
const LOCK_TRIES: u32 = 50;
const LOCK_PAUSE: Duration = Duration::from_millis(2);

/// Content of a mark, as JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct BaseMark {
    version: u32,
    /// How far the disk is on its way back.
    pub(super) phase: Phase,
    /// Overlay files over the disk, as absolute paths.
    pub(super) overlays: Vec<PathBuf>,
    /// When the disk was frozen, in seconds since 1970.
    frozen_at_unix_s: u64,
}

/// What a mark says about its overlays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Phase {
    /// They hold what was written since the fork.
    Frozen,
    /// They are merged: what is left of them is waste.
    Merged,
}

impl BaseMark {
    /// Where the mark of `disk` is.
    pub(super) fn path_of(disk: &Path) -> PathBuf {
        durable::beside(disk, ".forkvm-base")
    }

    /// The mark of a disk that is frozen now, under `overlay`.
    fn of(overlay: PathBuf) -> BaseMark {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        BaseMark {
            version: VERSION,
            phase: Phase::Frozen,
            overlays: vec![overlay],
            frozen_at_unix_s: now.map_or(0, |since| since.as_secs()),
        }
    }

    /// Reads the mark of `disk`, if it has one.
    pub(super) fn load(disk: &Path) -> Result<Option<BaseMark>, MarkError> {
        let path = BaseMark::path_of(disk);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(MarkError::Io { path, source }),
        };
        let mark: BaseMark =
            serde_json::from_slice(&bytes).map_err(|error| MarkError::Damaged {
                path: path.clone(),
                what: error.to_string(),
            })?;
        if mark.version != VERSION {
            let what = format!(
                "it has version {}, this program reads {VERSION}",
                mark.version
            );
            return Err(MarkError::Damaged { path, what });
        }
        Ok(Some(mark))
    }

    /// Replaces the mark of `disk` as a whole.
    pub(super) fn store(&self, disk: &Path) -> Result<(), MarkError> {
        let path = BaseMark::path_of(disk);
        serde_json::to_vec_pretty(self)
            .map_err(io::Error::from)
            .and_then(|json| durable::replace(&path, &json))
            .map_err(|source| MarkError::Io { path, source })
    }

    /// Removes the mark of `disk`.
    pub(super) fn remove(disk: &Path) -> Result<(), MarkError> {
        let path = BaseMark::path_of(disk);
        durable::remove(&path).map_err(|source| MarkError::Io { path, source })
    }
}

impl RawFile {
    /// Makes this disk, open for writing, the frozen base of `overlay` and of the clones' overlays:
    /// what was written is flushed, the mark is there for good, writes are refused, and others may
    /// open the file for reading. On an error the disk is as it was.
    ///
    /// Create `overlay` first: a mark never names a file that was not there. A disk that is frozen
    /// already gets one more overlay into its mark.
    pub fn freeze_as_base(&self, overlay: &Path) -> Result<(), MarkError> {
        if self.access == Access::ReadOnly {
            return Err(MarkError::NotWriter {
                disk: self.path.clone(),
            });
        }
        let io_error = |source| MarkError::Io {
            path: self.path.clone(),
            source,
        };
        let overlay = std::path::absolute(overlay).map_err(io_error)?;
        if self.frozen.load(Ordering::Acquire) {
            let mark = BaseMark::load(&self.path)?;
            let mut mark = mark.ok_or_else(|| MarkError::Gone {
                disk: self.path.clone(),
            })?;
            if !mark.overlays.contains(&overlay) {
                mark.overlays.push(overlay);
                mark.store(&self.path)?;
            }
            return Ok(());
        }
        self.file.sync_all().map_err(io_error)?;
        self.frozen.store(true, Ordering::Release);
        // flock(2) gives the old lock up before it takes the new one. A writer that slips in
        // between finds the mark and goes again.
        let marked = BaseMark::of(overlay.clone())
            .store(&self.path)
            .and_then(|()| lock_patiently(|| self.file.try_lock_shared()).map_err(io_error));
        if marked.is_err()
            && let Err(error) = self.unfreeze(&overlay)
        {
            tracing::error!(%error, disk = %self.path.display(), "a freeze could not be undone");
        }
        marked
    }

    /// Undoes [`RawFile::freeze_as_base`] for `overlay` when a fork is rolled back. Once no overlay
    /// is left the mark is removed and this instance writes again. An error while anybody else has
    /// the file open; the disk then stays frozen, under its mark. A disk that is not frozen is left
    /// alone.
    pub fn unfreeze(&self, overlay: &Path) -> Result<(), MarkError> {
        if !self.frozen.load(Ordering::Acquire) {
            return Ok(());
        }
        let io_error = |source| MarkError::Io {
            path: self.path.clone(),
            source,
        };
        let overlay = std::path::absolute(overlay).map_err(io_error)?;
        if let Some(mut mark) = BaseMark::load(&self.path)? {
            mark.overlays.retain(|named| *named != overlay);
            if !mark.overlays.is_empty() {
                return mark.store(&self.path);
            }
        }
        if let Err(error) = self.file.try_lock() {
            // The failed attempt has cost the shared lock as well.
            lock_patiently(|| self.file.try_lock_shared()).map_err(io_error)?;
            return Err(io_error(error.into()));
        }
        if let Err(error) = BaseMark::remove(&self.path) {
            lock_patiently(|| self.file.try_lock_shared()).map_err(io_error)?;
            return Err(error);
        }
        self.frozen.store(false, Ordering::Release);
        Ok(())
    }

    /// The overlays that the mark beside this disk names, from the bottom up; none without a mark.
    pub fn named_overlays(&self) -> Result<Vec<PathBuf>, MarkError> {
        Ok(BaseMark::load(&self.path)?.map_or_else(Vec::new, |mark| mark.overlays))
    }
}

/// Takes a lock that is held by others for moments only.
fn lock_patiently(attempt: impl Fn() -> Result<(), TryLockError>) -> io::Result<()> {
    let mut tries = 0;
    loop {
        match attempt() {
            Err(TryLockError::WouldBlock) if tries < LOCK_TRIES => {
                tries += 1;
                std::thread::sleep(LOCK_PAUSE);
            }
            locked => return locked.map_err(io::Error::from),
        }
    }
}

/// Takes the exclusive lock of `file`; `None` when somebody else has it open.
pub(super) fn lock_alone(file: File) -> io::Result<Option<File>> {
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Why a disk could not be marked, or its mark not be read.
#[derive(Debug, Error)]
pub enum MarkError {
    /// The file system failed, or a lock could not be had.
    #[error("{path} could not be read, written or locked")]
    Io {
        /// Path of the mark or the disk.
        path: PathBuf,
        /// What the file system said.
        source: io::Error,
    },
    /// The mark cannot be understood.
    #[error(
        "the mark {path} of a frozen base cannot be used: {what}; its disk is not opened for \
         writing until the mark is restored"
    )]
    Damaged {
        /// Path of the mark.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// Only the writer of a disk can freeze it.
    #[error("the disk {disk} is open for reading only and needs no freeze")]
    NotWriter {
        /// Path of the disk.
        disk: PathBuf,
    },
    /// The mark was removed by somebody else.
    #[error("the mark of the frozen base {disk} is gone: somebody removed it while a VM ran")]
    Gone {
        /// Path of the disk.
        disk: PathBuf,
    },
}
