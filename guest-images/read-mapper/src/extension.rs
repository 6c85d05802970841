//! The edit distance of a read around one place of the text, by furthest-reaching diagonals.
//!
//! The method is that of Landau and Vishkin (and Ukkonen): for each number of edits `e` and each
//! diagonal (text position minus read position) keep only how far an alignment with `e` edits can
//! get. A read with few edits costs a few comparisons of eight bases each, whatever its length,
//! and the search stops at the limit it is given.
//!
//! The read is taken from its last base to its first. The end of the alignment on the text is
//! free, and so, when the first base is reached on some diagonal, that diagonal *is* a starting
//! position: all optimal starts fall out at once, and the way back through the table is the CIGAR
//! from left to right.

use alloc::vec::Vec;
use core::ops::RangeInclusive;

use crate::alignment::{Cigar, CigarOp};
use crate::base::READ_EDGE;
use crate::references::References;

/// Bases compared at a time, and the padding that this needs before a read's first base.
const WORD: usize = 8;

/// More bases left than any read has: this diagonal cannot be reached.
const UNREACHED: u32 = u32::MAX;

/// A read in codes, with its edge before it.
#[derive(Debug, Default)]
pub(crate) struct PaddedRead {
    codes: Vec<u8>,
}

impl PaddedRead {
    /// Replaces the read by these codes.
    pub(crate) fn fill(&mut self, codes: impl Iterator<Item = u8>) {
        self.codes.clear();
        self.codes.resize(WORD, READ_EDGE);
        self.codes.extend(codes);
    }

    /// The read without its edge.
    pub(crate) fn codes(&self) -> &[u8] {
        self.codes.get(WORD..).unwrap_or_default()
    }

    /// The eight codes before the last `left` ones; includes the edge where fewer are left.
    fn word_before(&self, left: usize) -> u64 {
        word_before(&self.codes, left + WORD)
    }
}

/// The eight bytes before `end`, the nearest one the most significant; zero before the start.
#[inline]
fn word_before(bytes: &[u8], end: usize) -> u64 {
    let word = bytes
        .get(..end)
        .and_then(|before| before.last_chunk::<WORD>());
    word.map_or(0, |word| u64::from_le_bytes(*word))
}

/// Finds distances in one text; owns the table, so that it is allocated once per thread.
#[derive(Debug, Default)]
pub(crate) struct Extension {
    /// `levels[e * width + 1 + (d - first)]`: read bases left after `e` edits on diagonal `d`.
    /// One unreachable entry on each side of a level stands for the diagonals outside the band.
    levels: Vec<u32>,
    width: usize,
    first: i64,
    /// Number of the level that reached the read's first base.
    reached: usize,
}

/// What is searched: a read, and the part of the text it may lie on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Search<'a> {
    pub(crate) read: &'a PaddedRead,
    pub(crate) text: &'a [u8],
    /// The reference's first text position, and the one after its last.
    pub(crate) start: usize,
    pub(crate) end: usize,
}

impl<'a> Search<'a> {
    pub(crate) fn new(references: &'a References, reference: usize, read: &'a PaddedRead) -> Self {
        let range = references.list()[reference].text();
        Search {
            read,
            text: references.text(),
            start: range.start,
            end: range.end,
        }
    }

    /// Text boundary that an alignment has come to; `None` outside the reference.
    fn boundary(&self, diagonal: i64, left: u32) -> Option<usize> {
        let boundary = usize::try_from(diagonal + i64::from(left)).ok()?;
        (self.start..=self.end)
            .contains(&boundary)
            .then_some(boundary)
    }

    /// Read bases left after all equal ones were taken, from `left` on.
    ///
    /// The separator before the reference and the edge before the read both end the comparison.
    fn slide(&self, diagonal: i64, left: u32) -> u32 {
        let Some(mut boundary) = self.boundary(diagonal, left) else {
            return UNREACHED;
        };
        let mut left = left as usize;
        loop {
            let differ = self.read.word_before(left) ^ word_before(self.text, boundary);
            if differ != 0 {
                // At most `left` bases are equal: the edge differs from every code.
                return left as u32 - differ.leading_zeros() / 8;
            }
            left -= WORD;
            boundary -= WORD;
        }
    }
}

impl Extension {
    /// Smallest number of edits, `limit` at most, of an alignment that stays on these diagonals.
    pub(crate) fn distance(
        &mut self,
        search: &Search<'_>,
        diagonals: RangeInclusive<i64>,
        limit: usize,
    ) -> Option<usize> {
        self.first = *diagonals.start();
        self.width = (diagonals.end() - diagonals.start() + 3) as usize;
        self.levels.clear();
        for edits in 0..=limit {
            self.levels.push(UNREACHED);
            let mut done = false;
            for diagonal in diagonals.clone() {
                let left = match edits {
                    0 => search.read.codes().len() as u32,
                    _ => self.step(search, edits, diagonal).0,
                };
                let left = if left == UNREACHED {
                    left
                } else {
                    search.slide(diagonal, left)
                };
                done |= left == 0;
                self.levels.push(left);
            }
            self.levels.push(UNREACHED);
            if done {
                self.reached = edits;
                return Some(edits);
            }
        }
        None
    }

    /// All starts (text positions, ascending) of alignments with the distance just found.
    pub(crate) fn starts(&self) -> impl Iterator<Item = usize> {
        let level = &self.levels[self.reached * self.width..];
        let reached = level.iter().enumerate().filter(|(_, left)| **left == 0);
        // A reached start is a boundary inside the reference, so it is not negative.
        reached.map(|(column, _)| (self.first + column as i64 - 1) as usize)
    }

    /// One alignment with the distance just found that starts at `start`, one of [`Self::starts`].
    pub(crate) fn cigar(&self, search: &Search<'_>, start: usize) -> Cigar {
        let mut cigar = Cigar::EMPTY;
        let mut diagonal = start as i64;
        let mut left = 0;
        for edits in (1..=self.reached).rev() {
            let (before, op) = self.step(search, edits, diagonal);
            cigar.push(CigarOp::Match, before - left);
            cigar.push(op, 1);
            match op {
                CigarOp::Match => left = before + 1,
                CigarOp::Insertion => (left, diagonal) = (before + 1, diagonal - 1),
                CigarOp::Deletion => (left, diagonal) = (before, diagonal + 1),
            }
        }
        cigar.push(CigarOp::Match, search.read.codes().len() as u32 - left);
        cigar
    }

    /// The furthest that one more edit gets on a diagonal, before equal bases are taken: read
    /// bases left, and which edit it was.
    fn step(&self, search: &Search<'_>, edits: usize, diagonal: i64) -> (u32, CigarOp) {
        let column = (edits - 1) * self.width + (diagonal - self.first) as usize + 1;
        let inside = |left: u32| search.boundary(diagonal, left).is_some();
        let consume = |left: u32| match left {
            0 | UNREACHED => UNREACHED,
            _ if inside(left - 1) => left - 1,
            _ => UNREACHED,
        };
        let skip = |left: u32| {
            if left != UNREACHED && inside(left) {
                left
            } else {
                UNREACHED
            }
        };
        let substitution = consume(self.levels[column]);
        let deletion = skip(self.levels[column + 1]);
        let insertion = consume(self.levels[column - 1]);
        if substitution <= deletion && substitution <= insertion {
            (substitution, CigarOp::Match)
        } else if deletion <= insertion {
            (deletion, CigarOp::Deletion)
        } else {
            (insertion, CigarOp::Insertion)
        }
    }
}
