//! The files of a disk that holds a tar archive (POSIX ustar; GNU tar writes the same fields).
//!
//! Reads headers only. File data begins on a sector, so a caller reads just the sectors it needs.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use crate::virtio_blk::{Disk, DiskError, SECTOR};

/// A regular file of an archive.
#[derive(Clone, Debug)]
pub struct File {
    /// Its name, as in the archive, without the `prefix` field.
    pub name: String,
    /// Its length in bytes.
    pub len: u64,
    /// Sector of its first byte.
    pub sector: u64,
}

/// Why an archive could not be listed.
#[derive(Clone, Copy, Debug)]
pub enum TarError {
    /// The disk failed.
    Disk(DiskError),
    /// What lies at this sector should be a header and is none.
    Header(u64),
}

impl fmt::Display for TarError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TarError::Disk(error) => write!(out, "reading the tar archive: {error}"),
            TarError::Header(sector) => write!(out, "no tar archive: sector {sector} is no header"),
        }
    }
}

/// Offsets and lengths of a header's fields.
const NAME: core::ops::Range<usize> = 0..100;
const SIZE: core::ops::Range<usize> = 124..136;
const TYPE: usize = 156;
const MAGIC: core::ops::Range<usize> = 257..262;

/// The regular files of the archive on `disk`, in its order.
pub fn list(disk: &Disk) -> Result<Vec<File>, TarError> {
    let mut files = Vec::new();
    let mut sector = 0;
    let mut header = [0; SECTOR];
    while (sector + 1) * SECTOR as u64 <= disk.bytes() {
        disk.read(sector, &mut header).map_err(TarError::Disk)?;
        if header.iter().all(|&byte| byte == 0) {
            break;
        }
        if header[MAGIC] != *b"ustar" {
            return Err(TarError::Header(sector));
        }
        let len = octal(&header[SIZE]).ok_or(TarError::Header(sector))?;
        if matches!(header[TYPE], b'0' | 0) {
            let name = until_zero(&header[NAME]);
            let name = String::from_utf8_lossy(name).into_owned();
            files.push(File {
                name,
                len,
                sector: sector + 1,
            });
        }
        sector += 1 + len.div_ceil(SECTOR as u64);
    }
    Ok(files)
}

fn until_zero(field: &[u8]) -> &[u8] {
    field.split(|&byte| byte == 0).next().unwrap_or_default()
}

fn octal(field: &[u8]) -> Option<u64> {
    let digits = core::str::from_utf8(until_zero(field)).ok()?.trim();
    u64::from_str_radix(digits, 8).ok()
}
