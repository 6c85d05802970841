//! A raw disk whose file another process has opened: for reading only.
//!
//! The descriptor came from that process, and with it its lock: flock(2) belongs to the open file,
//! which both share, and stays until the last of them has closed it. So nothing is locked here, and
//! nothing is looked for beside the file: that was done where it was opened ([`RawFile`](super::RawFile)).

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::{BlockLayer, Presence, SECTOR, Storage, check_range, refused_write};

/// See the module's text.
#[derive(Debug)]
pub struct ForeignFile {
    file: File,
    path: PathBuf,
    len: u64,
}

impl ForeignFile {
    /// Takes over `file`, which is called `path` and holds a disk of `len` bytes.
    pub fn new(file: File, path: PathBuf, len: u64) -> Result<ForeignFile, ForeignError> {
        let found = match file.metadata() {
            Ok(metadata) => metadata.len(),
            Err(source) => return Err(ForeignError::Io { path, source }),
        };
        if found != len {
            return Err(ForeignError::Size { path, found, len });
        }
        Ok(ForeignFile { file, path, len })
    }
}

impl BlockLayer for ForeignFile {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_only(&self) -> bool {
        true
    }

    fn read_at(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        check_range(offset, data.len() as u64, self.len)?;
        self.file.read_exact_at(data, offset)
    }

    fn write_at(&self, _offset: u64, _data: &[u8]) -> io::Result<()> {
        Err(refused_write())
    }

    /// What was written before it was frozen may still be volatile.
    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn discard(&self, _range: Range<u64>) -> io::Result<()> {
        Err(refused_write())
    }

    fn presence(&self, offset: u64) -> io::Result<Presence> {
        check_range(offset, SECTOR, self.len)?;
        Ok(Presence {
            present: true,
            len: self.len - offset,
        })
    }

    fn storage(&self) -> Storage<'_> {
        let path: &Path = &self.path;
        Storage::Raw {
            path,
            file: &self.file,
        }
    }
}

/// Why an open file cannot be taken over.
#[derive(Debug, Error)]
pub enum ForeignError {
    /// It is not as long as the disk.
    #[error("the disk {path} has {found} bytes, and {len} when it was handed over")]
    Size {
        /// Path of the disk.
        path: PathBuf,
        /// Its length.
        found: u64,
        /// Length that it should have.
        len: u64,
    },
    /// It cannot be looked at.
    #[error("the disk {path}, which was handed over, cannot be looked at")]
    Io {
        /// Path of the disk.
        path: PathBuf,
        /// What the file system said.
        source: io::Error,
    },
}
