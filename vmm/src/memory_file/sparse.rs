//! Where guest memory comes from: bytes with holes.
#![allow(unsafe_code)] // lseek(2) with SEEK_DATA on a shared reference: the standard library has none.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

/// Guest memory to be saved. It must not change while it is read.
///
/// Offsets are memory offsets in bytes: they count in the file that backs the guest's RAM.
pub trait MemorySource {
    /// Bytes of memory: a multiple of 4 KiB.
    fn memory_len(&self) -> io::Result<u64>;

    /// Fills `into` from `offset`. Only ever asked for what [`next_data`](Self::next_data) has
    /// announced, so that reading does not populate a hole.
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()>;

    /// The first range at or after `offset` that may hold something else than zeros; all between
    /// `offset` and its start reads as zero. It is not empty and ends within the memory. `None`
    /// when only zeros follow.
    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>>;
}

/// A memfd or a regular file, whose holes are found by SEEK_DATA.
///
/// Looking for data moves the descriptor's file position, which nothing here reads.
impl MemorySource for File {
    fn memory_len(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.read_exact_at(into, offset)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let Some(start) = seek(self, offset, libc::SEEK_DATA)? else {
            return Ok(None);
        };
        // There is a hole at the end of every file.
        let end = seek(self, start, libc::SEEK_HOLE)?.unwrap_or(start);
        Ok((start < end).then_some(start..end))
    }
}

/// The next place of the kind `whence` at or after `offset`; `None` when there is none before the
/// end of the file.
pub(crate) fn seek(file: &File, offset: u64, whence: libc::c_int) -> io::Result<Option<u64>> {
    let offset = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: lseek touches no memory of this process; the descriptor is open as long as `file`.
    let found = unsafe { libc::lseek(file.as_raw_fd(), offset, whence) };
    match u64::try_from(found) {
        Ok(found) => Ok(Some(found)),
        Err(_) => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            error => Err(error),
        },
    }
}

/// Whether all bytes are zero.
pub(super) fn is_zero(bytes: &[u8]) -> bool {
    static ZEROS: [u8; 4096] = [0; 4096];
    bytes
        .chunks(ZEROS.len())
        .all(|part| *part == ZEROS[..part.len()])
}
