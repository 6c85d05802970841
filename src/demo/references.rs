//! The genomes and reads of the demo, as Debian packages install them.
//!
//! Finds and unpacks them; a file that is not there is an error that names the package and the
//! command which installs it. Nothing is downloaded here.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use flate2::read::MultiGzDecoder;

/// A file of a Debian package, without the `.gz` that it may have.
struct PackagedFile {
    package: &'static str,
    path: &'static str,
}

const ECOLI: PackagedFile = PackagedFile {
    package: "bowtie-examples",
    path: "usr/share/doc/bowtie/examples/genomes/NC_008253.fna",
};

const LAMBDA: PackagedFile = PackagedFile {
    package: "bowtie2-examples",
    path: "usr/share/doc/bowtie2/examples/reference/lambda_virus.fa",
};

const LAMBDA_READS: [PackagedFile; 2] = [
    PackagedFile {
        package: "bowtie2-examples",
        path: "usr/share/doc/bowtie2/examples/reads/reads_1.fq",
    },
    PackagedFile {
        package: "bowtie2-examples",
        path: "usr/share/doc/bowtie2/examples/reads/reads_2.fq",
    },
];

/// What the packages hold, unpacked.
#[derive(Clone, Debug)]
pub struct Packaged {
    /// FASTA: *Escherichia coli* 536, NC_008253, 5 Mb.
    pub ecoli: Vec<u8>,
    /// FASTA: its phage lambda, NC_001416, 48 kb.
    pub lambda: Vec<u8>,
    /// FASTQ: 10,000 pairs of reads of lambda, the two mates of a pair under one name.
    pub lambda_reads: [Vec<u8>; 2],
}

impl Packaged {
    /// Reads the files as installed below `root`, which is `/` but in tests.
    ///
    /// # Errors
    /// A file that is missing or unreadable.
    pub fn load(root: &Path) -> Result<Packaged, PackagedError> {
        let [first, second] = LAMBDA_READS;
        Ok(Packaged {
            ecoli: ECOLI.read(root)?,
            lambda: LAMBDA.read(root)?,
            lambda_reads: [first.read(root)?, second.read(root)?],
        })
    }

    /// Both references, as one FASTA text: *E. coli*, then lambda.
    pub fn fasta(&self) -> Vec<u8> {
        [self.ecoli.as_slice(), self.lambda.as_slice()].concat()
    }
}

impl PackagedFile {
    /// debhelper packs files of a documentation folder beyond a size, so both forms are looked for.
    fn read(&self, root: &Path) -> Result<Vec<u8>, PackagedError> {
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

    #[test]
    fn a_missing_package_is_named_with_the_command_that_installs_it() {
        let empty = tempfile::tempdir().unwrap();
        let error = Packaged::load(empty.path()).unwrap_err().to_string();
        assert!(error.contains("NC_008253.fna.gz"), "{error}");
        assert!(error.contains("apt-get install bowtie-examples"), "{error}");
    }

    #[test]
    fn a_damaged_file_is_named() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join(format!("{}.gz", ECOLI.path));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, b"not gzip at all").unwrap();
        let error = Packaged::load(root.path()).unwrap_err();
        assert!(matches!(error, PackagedError::Unreadable { path: named, .. } if named == path));
    }

    #[test]
    fn packed_and_plain_files_read_the_same() {
        use std::io::Write;
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join(LAMBDA.path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, b">a\nACGT\n").unwrap();
        assert_eq!(LAMBDA.read(root.path()).unwrap(), b">a\nACGT\n");
        let packed = File::create(root.path().join(format!("{}.gz", LAMBDA.path))).unwrap();
        let mut packed = flate2::write::GzEncoder::new(packed, flate2::Compression::fast());
        packed.write_all(b">b\nACGT\n").unwrap();
        packed.finish().unwrap();
        assert_eq!(LAMBDA.read(root.path()).unwrap(), b">b\nACGT\n");
    }
}
