//! Everything the demo maps, made ready for the guests: three disk images in one folder.

use std::path::{Path, PathBuf};

use bio::io::fasta;
use forkvm_read_mapper::fastq::Records;
use forkvm_read_mapper::{FastaError, Index, References};
use serde::Serialize;

use super::disks::{self, DiskError};
use super::reads::{self, ReadsError};
use super::references::Packaged;
use super::simulate::{GenomeTooShort, Simulation};
use crate::packaged::PackagedError;

/// Bytes of a SAM line that its FASTQ record does not have, at most: reference, numbers, CIGAR.
const SAM_LINE_EXTRA: u64 = 192;

/// What to map.
#[derive(Clone, Copy, Debug)]
pub struct InputSpec {
    /// Reads drawn from *E. coli*.
    pub simulation: Simulation,
    /// Pairs taken of lambda's own 10,000.
    pub lambda_pairs: usize,
}

/// Where the guests' disks are, and what is on them.
#[derive(Debug)]
pub struct Input {
    /// Archive with `references.fa`.
    pub references_disk: PathBuf,
    /// Archive with `reads.fq`: lambda's mates (first all of one file, then of the other), then
    /// the simulated reads.
    pub reads_disk: PathBuf,
    /// Empty; room for the records of all reads, in case one guest writes them all.
    pub records_disk: PathBuf,
    /// Content of `references.fa`.
    pub fasta: Vec<u8>,
    /// Content of `reads.fq`.
    pub fastq: Vec<u8>,
    /// The host's own index.
    pub index: Index,
    /// Number of reads.
    pub reads: usize,
    /// Name of the reference that simulated reads were drawn from.
    pub simulated_from: String,
}

/// The object `input` of the demo's JSON.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct InputReport {
    /// Names of the references.
    pub references: Vec<String>,
    /// Bases of all references.
    pub bases: usize,
    /// Number of reads.
    pub reads: usize,
    /// Size of the index.
    pub index_mib: f64,
    /// How long a guest took to build it; `null` until one has.
    pub index_build_ms: Option<f64>,
}

impl Input {
    /// Reads the installed packages, draws the reads and writes the disks into `folder`.
    ///
    /// # Errors
    /// A package that is not installed; a folder that cannot be written to.
    pub fn prepare(folder: &Path, spec: &InputSpec) -> Result<Input, InputError> {
        Input::from_packages(&Packaged::load(Path::new("/"))?, folder, spec)
    }

    /// As [`Self::prepare`], from genomes and reads that are at hand.
    ///
    /// # Errors
    /// A folder that cannot be written to; data that is malformed.
    pub fn from_packages(
        packaged: &Packaged,
        folder: &Path,
        spec: &InputSpec,
    ) -> Result<Input, InputError> {
        let fasta = packaged.fasta();
        let index = Index::build(References::from_fasta(&fasta)?);
        let (simulated_from, genome) = first_sequence(&packaged.ecoli)?;

        let mut fastq = Vec::new();
        let [first, second] = &packaged.lambda_reads;
        reads::combine(&mut fastq, &[first, second], spec.lambda_pairs)?;
        fastq.extend(spec.simulation.fastq(&genome)?);
        let reads = Records::new(&fastq).count();

        let disk = |name: &str| folder.join(name);
        let input = Input {
            references_disk: disk("references.tar"),
            reads_disk: disk("reads.tar"),
            records_disk: disk("records.img"),
            fasta,
            fastq,
            index,
            reads,
            simulated_from,
        };
        disks::write_archive(&input.references_disk, &[("references.fa", &input.fasta)])?;
        disks::write_archive(&input.reads_disk, &[("reads.fq", &input.fastq)])?;
        let records = input.fastq.len() as u64 + reads as u64 * SAM_LINE_EXTRA;
        disks::create_empty(&input.records_disk, disks::DISK_UNIT + records)?;
        Ok(input)
    }

    /// Figures of the input, without what only a guest can measure.
    pub fn report(&self) -> InputReport {
        let references = self.index.references();
        InputReport {
            references: references
                .list()
                .iter()
                .map(|one| one.name().to_string())
                .collect(),
            bases: references.bases(),
            reads: self.reads,
            index_mib: self.index.size() as f64 / f64::from(1 << 20),
            index_build_ms: None,
        }
    }
}

/// Name and upper-case letters of a FASTA text's first record.
fn first_sequence(text: &[u8]) -> Result<(String, Vec<u8>), InputError> {
    match fasta::Reader::new(text).records().next() {
        Some(Ok(record)) => Ok((record.id().to_string(), record.seq().to_ascii_uppercase())),
        Some(Err(error)) => Err(InputError::Genome {
            reason: error.to_string(),
        }),
        None => Err(InputError::Genome {
            reason: "it has no record".into(),
        }),
    }
}

/// Why there is nothing to map.
#[derive(Debug, thiserror::Error)]
pub enum InputError {
    /// A package is not installed, or damaged.
    #[error(transparent)]
    Packaged(#[from] PackagedError),
    /// The genome to draw reads from is not FASTA.
    #[error("cannot read the genome to draw reads from: {reason}")]
    Genome {
        /// What the reader said.
        reason: String,
    },
    /// The genome to draw reads from is too short.
    #[error(transparent)]
    TooShort(#[from] GenomeTooShort),
    /// The references cannot be mapped to.
    #[error("cannot index the references: {0}")]
    Fasta(#[from] FastaError),
    /// The packaged reads cannot be used.
    #[error(transparent)]
    Reads(#[from] ReadsError),
    /// A disk image cannot be written.
    #[error(transparent)]
    Disk(#[from] DiskError),
}
