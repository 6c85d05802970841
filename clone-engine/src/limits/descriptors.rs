//! File descriptors that this process can still open.
#![allow(unsafe_code)] // getrlimit and setrlimit.

use std::fs;
use std::io;

/// Descriptors left free for the rest of the process.
const RESERVE: u64 = 32;

/// How many clones can have, once the soft limit is raised to the hard one.
pub(super) fn left() -> io::Result<u64> {
    Ok(raise_nofile()?.saturating_sub(open()? + RESERVE))
}

/// Linux 6.2 and later tell the number as the size of the folder; before, the entries are counted.
fn open() -> io::Result<u64> {
    const FOLDER: &str = "/proc/self/fd";
    match fs::metadata(FOLDER)?.len() {
        0 => Ok(fs::read_dir(FOLDER)?.count() as u64),
        open => Ok(open),
    }
}

/// Raises the soft limit of open files to the hard one; returns it.
pub fn raise_nofile() -> io::Result<u64> {
    let mut limit = super::resource_limit(libc::RLIMIT_NOFILE)?;
    if limit.rlim_cur < limit.rlim_max {
        limit.rlim_cur = limit.rlim_max;
        // SAFETY: the kernel reads exactly one rlimit.
        if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(limit.rlim_cur)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_counted_as_they_come_and_go() {
        // Other tests of this process may open a few meanwhile.
        let before = open().unwrap();
        let files: Vec<_> = (0..300)
            .map(|_| fs::File::open("/dev/null").unwrap())
            .collect();
        let with = open().unwrap();
        drop(files);
        let after = open().unwrap();
        assert!(
            with >= before + 250 && with >= after + 250,
            "{before} {with} {after}"
        );
    }
}
