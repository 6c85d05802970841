//! Exact mapping of short DNA reads: which place of the references is each read closest to?
//!
//! *Exact* is meant strictly. A read of `n` bases has an edit bound `E = min(7, n / 12 - 1)`
//! ([`edit_bound`]), and the mapper finds the smallest edit distance between the read, on either
//! strand, and any substring of any reference, whenever that distance is at most `E`; otherwise it
//! reports none. Nothing is heuristic, so another program can check every answer.
//!
//! How: `E + 1` disjoint 12-mers of the read cannot all be hit by `E` edits, so each alignment
//! within the bound contains one of them unchanged ([`Index`] lists where they are). Around each
//! such place the distance is found by furthest-reaching diagonals ([`Mapper`]).
//!
//! Order of answers: the smallest distance; then the reference that comes first; then the leftmost
//! position; then the forward strand. The distance is unique and any program must find the same.
//! Of several alignments at one position any is right, so CIGAR is one of the optimal ones.
//!
//! The crate runs in the freestanding guest and on the host: `no_std` with `alloc`, no dependency,
//! no thread, no I/O. Error types are written by hand for that reason: a derive would be one more
//! thing to build for the guest. It does not pair reads, clip them, or weigh base qualities.
//!
//! ```
//! use forkvm_read_mapper::{Index, Mapper, References, fastq, sam};
//!
//! let references = References::from_fasta(b">chr\nACGTTGCATTAGCCATGACCTGATTACAGGCATTCGA\n")?;
//! let index = Index::build(references);
//! let mut mapper = Mapper::new(&index);
//! let mut lines = Vec::new();
//! for record in fastq::Records::new(b"@r1\nTTAGCCATGACCTGATTACAGG\n+\nIIIIIIIIIIIIIIIIIIIIII\n") {
//!     let record = record?;
//!     let alignment = mapper.map(record.bases);
//!     sam::write_record(&mut lines, index.references(), &record, alignment.as_ref());
//! }
//! assert!(lines.starts_with(b"r1\t0\tchr\t9\t60\t22M\t"));
//! # Ok::<(), Box<dyn core::error::Error>>(())
//! ```
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod alignment;
mod base;
mod extension;
pub mod fastq;
mod index;
mod mapper;
mod references;
pub mod sam;

pub use alignment::{Alignment, Cigar, CigarOp, CigarRun};
pub use index::{Index, SEED};
pub use mapper::{MAX_EDITS, Mapper, edit_bound};
pub use references::{FastaError, Reference, References};
