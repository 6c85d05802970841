//! The file systems that programs expect, where they are not mounted already.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;

use rustix::mount::{MountFlags, mount};

use crate::log;

/// Type, place, options; in this order, since the second half lies in the first.
const ALL: &[(&str, &str, &str)] = &[
    ("proc", "/proc", ""),
    ("sysfs", "/sys", ""),
    ("devtmpfs", "/dev", ""),
    ("devpts", "/dev/pts", ""),
    ("tmpfs", "/dev/shm", "mode=1777"),
    ("tmpfs", "/tmp", "mode=1777"),
    ("tmpfs", "/run", "mode=0755"),
];

/// Names of a program's own streams, which shells' scripts rely on; devtmpfs has none of them.
const STREAMS: &[(&str, &str)] = &[
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
];

/// Mounts what is missing. What fails is told; a system without it may still do.
pub(super) fn mount_all() {
    for (kind, place, options) in ALL {
        if is_mounted(place) {
            continue;
        }
        if let Err(error) = make(kind, place, options) {
            log::line(&format!("mounting {kind} on {place}: {error}"));
        }
    }
    link_streams(Path::new("/dev"));
}

/// Makes [`STREAMS`] in `dev`, where they are not there already.
fn link_streams(dev: &Path) {
    for (name, target) in STREAMS {
        match symlink(target, dev.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                log::line(&format!("making {}/{name}: {error}", dev.display()));
            }
            _ => {}
        }
    }
}

fn make(kind: &str, place: &str, options: &str) -> io::Result<()> {
    fs::create_dir_all(place)?;
    let options = std::ffi::CString::new(options)?;
    mount(kind, place, kind, MountFlags::empty(), &*options)?;
    Ok(())
}

/// Before `/proc` is there nothing counts as mounted; the kernel then says so itself (EBUSY) where it matters.
fn is_mounted(place: &str) -> bool {
    list().iter().any(|mounted| mounted == place)
}

/// Places where something is mounted, in the order of mounting.
pub(super) fn list() -> Vec<String> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    places(&text)
}

/// The fifth field of each line (proc(5)), with its octal escapes.
fn places(mountinfo: &str) -> Vec<String> {
    let place = |line: &str| Some(unescaped(line.split(' ').nth(4)?));
    mountinfo.lines().filter_map(place).collect()
}

fn unescaped(field: &str) -> String {
    ["\\040", "\\011", "\\012", "\\134"]
        .iter()
        .zip([" ", "\t", "\n", "\\"])
        .fold(field.to_owned(), |text, (escape, letter)| {
            text.replace(escape, letter)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_read_with_their_blanks() {
        let text = "22 1 8:1 / / rw - ext4 /dev/vda rw\n23 22 0:5 / /a\\040b rw - tmpfs tmpfs rw\n";
        assert_eq!(places(text), ["/", "/a b"]);
    }

    #[test]
    fn a_program_finds_its_own_streams_in_dev_and_what_was_there_stays() {
        let dev = tempfile::tempdir().unwrap();
        symlink("/tmp", dev.path().join("fd")).unwrap();
        link_streams(dev.path());
        let target = |name| fs::read_link(dev.path().join(name)).unwrap();
        assert_eq!(target("fd"), Path::new("/tmp"));
        assert_eq!(target("stderr"), Path::new("/proc/self/fd/2"));
    }
}
