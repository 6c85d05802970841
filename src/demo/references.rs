//! The genomes and reads of the demo, as Debian packages install them.
//!
//! Which files they are; how they are found and unpacked is [`crate::packaged`]'s.

use std::path::Path;

use crate::packaged::{PackagedError, PackagedFile};

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
}
