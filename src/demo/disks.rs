//! Disk images of the demo: archives that a guest reads, and an empty disk that it writes.
//!
//! An archive is a ustar file (POSIX.1-2017, pax, "ustar Interchange Format") that starts at the
//! disk's first sector; a guest needs no more than its headers to find a file. Sizes are multiples
//! of 1 MiB, so that a guest can read in large pieces without minding the end.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// All images are multiples of this.
pub const DISK_UNIT: u64 = 1 << 20;

/// Writes an archive of these files (name and content), in this order, to `path`.
///
/// # Errors
/// A file that cannot be written. What was there before is gone then.
pub fn write_archive(path: &Path, files: &[(&str, &[u8])]) -> Result<(), DiskError> {
    let failed = |source| DiskError {
        path: path.to_path_buf(),
        source,
    };
    let file = File::create(path).map_err(failed)?;
    append_files(&file, files)
        .and_then(|()| pad(&file))
        .map_err(failed)
}

/// Makes an empty disk of `size` bytes, rounded up to [`DISK_UNIT`]; it takes no space on the host.
///
/// # Errors
/// A file that cannot be created or extended. What was there before is gone then.
pub fn create_empty(path: &Path, size: u64) -> Result<(), DiskError> {
    let created = File::create(path).and_then(|file| file.set_len(round_up(size)));
    created.map_err(|source| DiskError {
        path: path.to_path_buf(),
        source,
    })
}

fn append_files(file: &File, files: &[(&str, &[u8])]) -> io::Result<()> {
    let mut archive = tar::Builder::new(io::BufWriter::with_capacity(1 << 20, file));
    for (name, content) in files {
        let mut header = tar::Header::new_ustar();
        header.set_size(content.len() as u64);
        header.set_mode(0o444);
        archive.append_data(&mut header, name, *content)?;
    }
    archive.into_inner()?.flush()
}

fn pad(file: &File) -> io::Result<()> {
    file.set_len(round_up(file.metadata()?.len()))
}

fn round_up(size: u64) -> u64 {
    size.max(1).div_ceil(DISK_UNIT) * DISK_UNIT
}

/// A disk image could not be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the disk image {}: {source}; is there space, and permission?", path.display())]
pub struct DiskError {
    /// The image.
    pub path: PathBuf,
    /// What writing it said.
    pub source: io::Error,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn an_archive_reads_back_and_is_a_multiple_of_the_unit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("reads.tar");
        let large = vec![b'A'; (1 << 20) - 100];
        write_archive(&path, &[("a.fa", b">a\nACGT\n"), ("b.fq", &large)]).unwrap();
        assert_eq!(path.metadata().unwrap().len(), 2 * DISK_UNIT);
        let mut archive = tar::Archive::new(File::open(&path).unwrap());
        let read = archive.entries().unwrap().map(|entry| {
            let mut entry = entry.unwrap();
            assert!(entry.header().as_ustar().is_some());
            let name = entry.path().unwrap().display().to_string();
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            (name, content)
        });
        let read: Vec<_> = read.collect();
        assert_eq!(
            read,
            [
                ("a.fa".into(), b">a\nACGT\n".to_vec()),
                ("b.fq".into(), large)
            ]
        );
    }

    #[test]
    fn an_empty_disk_is_rounded_up_and_takes_no_space() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("records.img");
        create_empty(&path, 64 * DISK_UNIT + 1).unwrap();
        let metadata = path.metadata().unwrap();
        assert_eq!((metadata.len(), metadata.blocks()), (65 * DISK_UNIT, 0));
    }

    #[test]
    fn an_image_that_cannot_be_written_is_named() {
        let error = write_archive(Path::new("/nonexistent/a.tar"), &[]).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/a.tar"));
    }
}
