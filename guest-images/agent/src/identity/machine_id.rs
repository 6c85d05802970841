//! `/etc/machine-id`: replaced where it can be, covered where it cannot.

use std::fs;
use std::io;
use std::path::Path;

use rustix::mount::mount_bind;

/// Makes `id` what programs read. With a read-only `/etc`, a file in `/run` is mounted over the one there; it is there still the
/// next time, and is then only written.
pub(super) fn set(root: &Path, id: &str) -> io::Result<()> {
    let place = root.join("etc/machine-id");
    let text = format!("{id}\n");
    let replaced = replace(&place, &text);
    match replaced {
        Err(error) if is_fixed(&error) => cover(root, &place, &text)
            .map_err(|why| io::Error::new(why.kind(), format!("{error}, and covering it: {why}"))),
        replaced => replaced,
    }
}

/// A read-only file system, or a file that something is mounted over.
fn is_fixed(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EROFS | libc::EBUSY))
}

fn replace(place: &Path, text: &str) -> io::Result<()> {
    let beside = place.with_extension("forkvm");
    fs::write(&beside, text)?;
    fs::rename(&beside, place).inspect_err(|_| {
        if let Err(error) = fs::remove_file(&beside) {
            crate::log::line(&format!("removing {}: {error}", beside.display()));
        }
    })
}

fn cover(root: &Path, place: &Path, text: &str) -> io::Result<()> {
    let directory = root.join("run/forkvm");
    fs::create_dir_all(&directory)?;
    let ours = directory.join("machine-id");
    // In place: if it is mounted already, this is the file that programs see.
    fs::write(&ours, text)?;
    if fs::read_to_string(place)? != text {
        mount_bind(&ours, place)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn the_file_is_replaced_and_never_seen_half_written() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("etc")).unwrap();
        let place = root.path().join("etc/machine-id");
        fs::write(&place, "old\n").unwrap();
        let old = fs::metadata(&place).unwrap().ino();
        let reader = fs::File::open(&place).unwrap();
        set(root.path(), "0123").unwrap();
        assert_eq!(fs::read_to_string(&place).unwrap(), "0123\n");
        assert_ne!(fs::metadata(&place).unwrap().ino(), old);
        assert_eq!(io::read_to_string(reader).unwrap(), "old\n");
        assert_eq!(fs::read_dir(root.path().join("etc")).unwrap().count(), 1);
    }

    #[test]
    fn without_etc_it_fails() {
        let root = tempfile::tempdir().unwrap();
        assert!(set(root.path(), "0123").is_err());
    }
}
