//! Files of Debian packages: input of the demos, as it is installed.
//!
//! Finds and unpacks them; a file that is not there is an error that names the package and the
//! command which installs it. Nothing is downloaded here.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use flate2::read::MultiGzDecoder;

/// A file of a Debian package, without the `.gz` that it may have.
pub(crate) struct PackagedFile {
    pub(crate) package: &'static str,
    /// Below the root.
    pub(crate) path: &'static str,
}

impl PackagedFile {
    /// Its content, unpacked, as installed below `root`, which is `/` but in tests.
    ///
    /// debhelper packs files of a documentation folder beyond a size, so both forms are looked for.
    pub(crate) fn read(&self, root: &Path) -> Result<Vec<u8>, PackagedError> {
        let plain = root.join(self.path);
        let packed = root.join(format!("{}.gz", self.path));
        let unreadable = |path: &Path, source| PackagedError::Unreadable {
            path: path.to_path_buf(),
            package: self.package,
            source,
        };
        match File::open(&packed) {
            Ok(file) => {
                let mut bytes = Vec::new();
                let unpacked = MultiGzDecoder::new(file).read_to_end(&mut bytes);
                unpacked.map_err(|source| unreadable(&packed, source))?;
                Ok(bytes)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => match fs::read(&plain) {
                Ok(bytes) => Ok(bytes),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    Err(PackagedError::Missing {
                        path: packed,
                        package: self.package,
                    })
                }
                Err(source) => Err(unreadable(&plain, source)),
            },
            Err(source) => Err(unreadable(&packed, source)),
        }
    }
}

/// Why a file of a package could not be had.
#[derive(Debug, thiserror::Error)]
pub enum PackagedError {
    /// The package is not installed.
    #[error("cannot find {}; install it: apt-get install {package}", path.display())]
    Missing {
        /// Where the file would be.
        path: PathBuf,
        /// Debian package that has it.
        package: &'static str,
    },
    /// The file is there and cannot be read or unpacked.
    #[error(
        "cannot read {}: {source}; install its package again: apt-get install --reinstall {package}",
        path.display()
    )]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Debian package that has it.
        package: &'static str,
        /// What reading it said.
        source: io::Error,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOME: PackagedFile = PackagedFile {
        package: "some-package",
        path: "usr/share/doc/some/file.fa",
    };

    #[test]
    fn a_damaged_file_is_named() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join(format!("{}.gz", SOME.path));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, b"not gzip at all").unwrap();
        let error = SOME.read(root.path()).unwrap_err();
        assert!(matches!(error, PackagedError::Unreadable { path: named, .. } if named == path));
    }

    #[test]
    fn packed_and_plain_files_read_the_same() {
        use std::io::Write;
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join(SOME.path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, b">a\nACGT\n").unwrap();
        assert_eq!(SOME.read(root.path()).unwrap(), b">a\nACGT\n");
        let packed = File::create(root.path().join(format!("{}.gz", SOME.path))).unwrap();
        let mut packed = flate2::write::GzEncoder::new(packed, flate2::Compression::fast());
        packed.write_all(b">b\nACGT\n").unwrap();
        packed.finish().unwrap();
        assert_eq!(SOME.read(root.path()).unwrap(), b">b\nACGT\n");
    }
}
