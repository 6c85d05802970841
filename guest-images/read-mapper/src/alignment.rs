//! What the mapper answers: where a read lies, and how it differs there.

use core::fmt;

use crate::mapper::MAX_EDITS;

/// Best place of a read, by the order given in the [crate's documentation](crate).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alignment {
    /// Index of the reference, in the order of the FASTA input.
    pub reference: usize,
    /// Leftmost reference base that the alignment covers, counted from 0.
    pub position: usize,
    /// The read's reverse complement is what aligns.
    pub reverse: bool,
    /// Edit distance: substitutions, inserted and deleted bases. An N counts as one.
    pub distance: u32,
    /// How the read (its reverse complement, if [`Self::reverse`]) lies on the reference.
    pub cigar: Cigar,
    /// Number of places with this distance, both strands counted, at least 1. Starting positions
    /// at most `distance` apart (on one strand) may be one alignment shifted, and count as one.
    pub locations: usize,
}

impl Alignment {
    /// Probability that the place is wrong, as -10 log10 of it (SAM 1.6, MAPQ): 60 for the only
    /// place, 3 or less where the read may as well come from another.
    pub fn mapping_quality(&self) -> u8 {
        match self.locations {
            0 | 1 => 60,
            2 => 3,
            3 => 2,
            4..=9 => 1,
            _ => 0,
        }
    }
}

/// Operation of a [`Cigar`] (SAM 1.6, section 1.4, field 6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CigarOp {
    /// `M`: a base of the read over a base of the reference, equal or not.
    Match,
    /// `I`: a base that only the read has.
    Insertion,
    /// `D`: a base that only the reference has.
    Deletion,
}

impl CigarOp {
    /// The letter of the operation in SAM.
    pub fn letter(self) -> u8 {
        match self {
            CigarOp::Match => b'M',
            CigarOp::Insertion => b'I',
            CigarOp::Deletion => b'D',
        }
    }
}

/// `length` times the same operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CigarRun {
    /// Number of bases, at least 1.
    pub length: u32,
    /// What is done with them.
    pub op: CigarOp,
}

/// Every edit can be a run of its own, and matches lie between them.
const MAX_RUNS: usize = 2 * MAX_EDITS + 1;

/// A CIGAR, left to right on the reference. Kept in place: a read costs no allocation.
#[derive(Clone, Copy)]
pub struct Cigar {
    runs: [CigarRun; MAX_RUNS],
    len: usize,
}

impl Cigar {
    pub(crate) const EMPTY: Cigar = Cigar {
        runs: [CigarRun {
            length: 0,
            op: CigarOp::Match,
        }; MAX_RUNS],
        len: 0,
    };

    /// The runs; two neighbours never have the same operation.
    pub fn runs(&self) -> &[CigarRun] {
        &self.runs[..self.len]
    }

    /// Number of reference bases that the alignment covers.
    pub fn reference_len(&self) -> usize {
        let over = self
            .runs()
            .iter()
            .filter(|run| run.op != CigarOp::Insertion);
        over.map(|run| run.length as usize).sum()
    }

    /// Appends, joining equal neighbours. At most [`MAX_EDITS`] edits ever come in, which is what
    /// the array is sized for.
    pub(crate) fn push(&mut self, op: CigarOp, length: u32) {
        if length == 0 {
            return;
        }
        if let Some(last) = self.runs[..self.len].last_mut()
            && last.op == op
        {
            last.length += length;
            return;
        }
        self.runs[self.len] = CigarRun { length, op };
        self.len += 1;
    }
}

impl PartialEq for Cigar {
    fn eq(&self, other: &Self) -> bool {
        self.runs() == other.runs()
    }
}

impl Eq for Cigar {}

impl fmt::Display for Cigar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.runs()
            .iter()
            .try_for_each(|run| write!(f, "{}{}", run.length, run.op.letter() as char))
    }
}

impl fmt::Debug for Cigar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cigar({self})")
    }
}
