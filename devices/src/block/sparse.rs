//! Sparse files: an anonymous one, and holes in any.
#![allow(unsafe_code)] // std has neither memfd_create(2) nor fallocate(2).

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;

/// Bytes of zeros that are written at a time where holes are not supported.
const ZEROS_LEN: u64 = 64 * 1024;

/// An empty file in memory; `name` is what `/proc/<pid>/fd` shows.
pub(super) fn memfd(name: &CStr) -> io::Result<File> {
    // SAFETY: `name` is a NUL-terminated string that outlives the call.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so `fd` is a descriptor that nothing else owns.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Makes `range` of `file` read as zero without changing the file's length, and gives the space
/// back where the file system can.
pub(super) fn punch_hole(file: &File, range: Range<u64>) -> io::Result<()> {
    zero_by(libc::FALLOC_FL_PUNCH_HOLE, file, range)
}

/// Makes `range` of `file` read as zero without changing the file's length, and keeps the space
/// reserved.
pub(super) fn zero_range(file: &File, range: Range<u64>) -> io::Result<()> {
    zero_by(libc::FALLOC_FL_ZERO_RANGE, file, range)
}

/// Zeroes `range` by a mode of fallocate(2), or by writing where the file system does not know it.
fn zero_by(mode: libc::c_int, file: &File, range: Range<u64>) -> io::Result<()> {
    if range.is_empty() {
        return Ok(());
    }
    loop {
        // SAFETY: the call touches no memory of this process.
        let result = unsafe {
            libc::fallocate(
                file.as_raw_fd(),
                mode | libc::FALLOC_FL_KEEP_SIZE,
                range.start as libc::off_t,
                (range.end - range.start) as libc::off_t,
            )
        };
        if result == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EINTR) => {}
            Some(libc::EOPNOTSUPP) => return write_zeros(file, range),
            _ => return Err(error),
        }
    }
}

fn write_zeros(file: &File, range: Range<u64>) -> io::Result<()> {
    let zeros = vec![0; ZEROS_LEN.min(range.end - range.start) as usize];
    let mut at = range.start;
    while at < range.end {
        let len = (range.end - at).min(ZEROS_LEN);
        file.write_all_at(&zeros[..len as usize], at)?;
        at += len;
    }
    Ok(())
}
