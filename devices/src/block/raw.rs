//! A disk that is a plain file, sector for sector.
//!
//! The file is locked (flock) as long as it is open: shared for readers, exclusive for the one
//! writer. How a disk that was written becomes the frozen base of clones is `base_mark`'s.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::ops::{Deref, Range};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use thiserror::Error;

use super::base_mark::{BaseMark, MarkError};
use super::{BlockLayer, Presence, SECTOR, Storage, check_range, refused_write, sparse};

/// What a disk is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading, together with other readers.
    ReadOnly,
    /// Reading and writing, alone.
    ReadWrite,
}

/// A disk in a file.
#[derive(Debug)]
pub struct RawFile {
    pub(super) file: LockedFile,
    pub(super) path: PathBuf,
    pub(super) access: Access,
    /// Opened for writing, but the base of a fork since.
    pub(super) frozen: AtomicBool,
    len: u64,
}

/// A file that is locked. Dropped, it is not: also where another process has a duplicate of its
/// descriptor, which only the clones of whoever dropped it can have worked on.
#[derive(Debug)]
pub(super) struct LockedFile(File);

impl Deref for LockedFile {
    type Target = File;

    fn deref(&self) -> &File {
        &self.0
    }
}

impl Drop for LockedFile {
    fn drop(&mut self) {
        if let Err(error) = self.0.unlock() {
            tracing::warn!(%error, "a disk could not be unlocked");
        }
    }
}

impl RawFile {
    /// Opens and locks the file at `path`. A file that is the frozen base of a fork is refused for
    /// writing.
    pub fn open(path: impl AsRef<Path>, access: Access) -> Result<RawFile, RawFileError> {
        let path = path.as_ref();
        let opened = OpenOptions::new()
            .read(true)
            .write(access == Access::ReadWrite)
            .custom_flags(libc::O_NONBLOCK) // opening a pipe by mistake must not wait for a peer
            .open(path);
        let file = opened.map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => RawFileError::Missing { path: path.into() },
            io::ErrorKind::IsADirectory => RawFileError::NotAFile { path: path.into() },
            _ => RawFileError::Io {
                path: path.into(),
                doing: "opened",
                source,
            },
        })?;
        RawFile::from_file(file, path, access)
    }

    /// Takes over an open descriptor, under the same conditions as [`RawFile::open`]. `path` is
    /// what the file is called; symbolic links in it are followed now, once. A file with several
    /// names (hard links) is refused for writing.
    pub fn from_file(
        file: File,
        path: impl Into<PathBuf>,
        access: Access,
    ) -> Result<RawFile, RawFileError> {
        let path = path.into();
        let io_error = |path: &PathBuf, doing| {
            let path = path.clone();
            move |source| RawFileError::Io {
                path,
                doing,
                source,
            }
        };
        let metadata = file.metadata().map_err(io_error(&path, "examined"))?;
        if !metadata.is_file() {
            return Err(RawFileError::NotAFile { path });
        }
        // The mark of a frozen base lies beside the file: all who open it must look at one place.
        let path = match fs::canonicalize(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => std::path::absolute(&path),
            resolved => resolved,
        }
        .map_err(io_error(&path, "resolved"))?;
        if access == Access::ReadWrite && metadata.nlink() > 1 {
            return Err(RawFileError::HardLinked {
                path,
                names: metadata.nlink(),
            });
        }
        let locked = match access {
            Access::ReadOnly => file.try_lock_shared(),
            Access::ReadWrite => file.try_lock(),
        };
        match locked {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(RawFileError::Locked { path, access }),
            Err(TryLockError::Error(source)) => return Err(io_error(&path, "locked")(source)),
        }
        // Under the lock: whoever freezes the file holds it from before the mark is written.
        if access == Access::ReadWrite
            && let Some(mark) = BaseMark::load(&path)?
        {
            return Err(RawFileError::FrozenBase {
                path,
                overlays: mark.overlays,
            });
        }
        let len = file.metadata().map_err(io_error(&path, "examined"))?.len();
        if len == 0 || !len.is_multiple_of(SECTOR) {
            return Err(RawFileError::Size { path, len });
        }
        Ok(RawFile {
            file: LockedFile(file),
            path,
            access,
            frozen: AtomicBool::new(false),
            len,
        })
    }

    /// Takes over a disk that an earlier process has frozen as the base of overlays
    /// ([`RawFile::freeze_as_base`]), to go on as the one that names overlays in its mark. `file` is
    /// open for reading and writing; it is locked for reading. `overlays` are those that the mark
    /// must name, from the bottom up: the last one is about to be written, so nothing may stand on it.
    pub fn from_frozen(
        file: File,
        path: impl Into<PathBuf>,
        overlays: &[&Path],
    ) -> Result<RawFile, RawFileError> {
        let mut base = RawFile::from_file(file, path, Access::ReadOnly)?;
        let Some(mark) = BaseMark::load(&base.path)? else {
            return Err(RawFileError::NotFrozen { path: base.path });
        };
        if mark.overlays != overlays {
            return Err(RawFileError::FrozenBase {
                path: base.path,
                overlays: mark.overlays,
            });
        }
        base.access = Access::ReadWrite;
        base.frozen = AtomicBool::new(true);
        Ok(base)
    }

    /// What the file is called: an absolute path without symbolic links.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `range`, if it may be changed.
    fn check_change(&self, range: Range<u64>) -> io::Result<Range<u64>> {
        if self.read_only() {
            return Err(refused_write());
        }
        let len = range.end.saturating_sub(range.start);
        check_range(range.start, len, self.len)
    }
}

impl BlockLayer for RawFile {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_only(&self) -> bool {
        self.access == Access::ReadOnly || self.frozen.load(Ordering::Acquire)
    }

    fn read_at(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        check_range(offset, data.len() as u64, self.len)?;
        self.file.read_exact_at(data, offset)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        if self.read_only() {
            return Err(refused_write());
        }
        check_range(offset, data.len() as u64, self.len)?;
        self.file.write_all_at(data, offset)
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn discard(&self, range: Range<u64>) -> io::Result<()> {
        sparse::punch_hole(&self.file, self.check_change(range)?)
    }

    fn write_zeroes(&self, range: Range<u64>) -> io::Result<()> {
        sparse::zero_range(&self.file, self.check_change(range)?)
    }

    fn presence(&self, offset: u64) -> io::Result<Presence> {
        let rest = check_range(offset, SECTOR, self.len)?.start..self.len;
        Ok(Presence {
            present: true,
            len: rest.end - rest.start,
        })
    }

    fn storage(&self) -> Storage<'_> {
        Storage::Raw {
            path: &self.path,
            file: &self.file,
        }
    }
}

/// Why a raw disk could not be opened.
#[derive(Debug, Error)]
pub enum RawFileError {
    /// There is no such file.
    #[error("the disk {path} does not exist: create it, or correct its path")]
    Missing {
        /// Path of the disk.
        path: PathBuf,
    },
    /// A directory, device, socket or pipe.
    #[error("the disk {path} is not a regular file: name a raw disk image")]
    NotAFile {
        /// Path of the disk.
        path: PathBuf,
    },
    /// Another name of it would hide that it is a frozen base.
    #[error(
        "the disk {path} has {names} names (hard links), and a fork could be undone by writing \
         under another one: remove the others, copy the disk, or open it read-only"
    )]
    HardLinked {
        /// Path of the disk.
        path: PathBuf,
        /// Number of its names.
        names: u64,
    },
    /// Somebody else has it open.
    #[error("the disk {path} cannot be opened {}", locked_mend(*.access))]
    Locked {
        /// Path of the disk.
        path: PathBuf,
        /// What it was to be opened for.
        access: Access,
    },
    /// Empty, or not whole sectors.
    #[error(
        "the disk {path} has {len} bytes: a raw disk has at least one sector and is a multiple of \
         512 bytes long; is it truncated, or not a raw image?"
    )]
    Size {
        /// Path of the disk.
        path: PathBuf,
        /// Its length.
        len: u64,
    },
    /// Clones, and the VM that was forked, may rely on its content.
    #[error(
        "the disk {path} was forked and is a frozen base; what was written since is in {}: \
         `forkvm disk commit {}` merges it back once no VM uses it, or open the disk read-only",
        list(.overlays), .path.display()
    )]
    FrozenBase {
        /// Path of the disk.
        path: PathBuf,
        /// The overlays over it that have been named.
        overlays: Vec<PathBuf>,
    },
    /// The overlays over it were merged or given up.
    #[error(
        "the disk {path} is not a frozen base any more: its overlays were merged or given up since"
    )]
    NotFrozen {
        /// Path of the disk.
        path: PathBuf,
    },
    /// The mark beside the disk cannot be used, so nobody knows whether it is a frozen base.
    #[error(transparent)]
    Mark(#[from] MarkError),
    /// The file system failed.
    #[error("the disk {path} could not be {doing}")]
    Io {
        /// Path of the disk.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// What the file system said.
        source: io::Error,
    },
}

fn locked_mend(access: Access) -> &'static str {
    match access {
        Access::ReadOnly => "for reading: a VM writes it; end that VM first",
        Access::ReadWrite => {
            "for writing: another VM has it open; end that VM first, or open both read-only"
        }
    }
}

/// Paths, for a message.
pub(super) fn list(paths: &[PathBuf]) -> String {
    paths
        .iter()
        .map(|path| path.display().to_string())
        .collect::<Vec<_>>()
        .join(", ")
}
