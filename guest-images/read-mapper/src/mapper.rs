//! Maps one read at a time: seeds, candidate places, distances, the best of them.
//!
//! A mapper belongs to one thread; any number of them read one [`Index`].

use alloc::vec::Vec;

use crate::alignment::Alignment;
use crate::base::{READ_OTHER, code, complement_code};
use crate::extension::{Extension, PaddedRead, Search};
use crate::index::{Index, SEED, seed_code};

/// Most edits that are ever allowed.
pub const MAX_EDITS: usize = 7;

/// Edits allowed in a read of `len` bases: one less than the disjoint seeds it holds, and
/// [`MAX_EDITS`] at most. `None`: too short to hold a seed, never mapped.
pub fn edit_bound(len: usize) -> Option<usize> {
    Some((len / SEED).checked_sub(1)?.min(MAX_EDITS))
}

/// A seed of the read and the places where the references have it.
#[derive(Clone, Copy, Debug)]
struct Seed<'a> {
    offset: usize,
    positions: &'a [u32],
}

/// A seed found in a reference: the read would start at text position `diagonal` (which may lie
/// before the reference) if nothing were inserted or deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Hit {
    reference: usize,
    diagonal: i64,
}

/// Neighbouring hits: one alignment may hold all of these seeds.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    reverse: bool,
    reference: usize,
    first: i64,
    last: i64,
    hits: usize,
}

/// Start of an optimal alignment. Ordered as answers are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Start {
    reference: usize,
    text: usize,
    reverse: bool,
}

/// Maps reads to the references of one index.
#[derive(Debug)]
pub struct Mapper<'a> {
    index: &'a Index,
    forward: PaddedRead,
    backward: PaddedRead,
    extension: Extension,
    seeds: Vec<Seed<'a>>,
    hits: Vec<Hit>,
    candidates: Vec<Candidate>,
    starts: Vec<Start>,
}

impl<'a> Mapper<'a> {
    /// A mapper with its own scratch memory, a few KiB.
    pub fn new(index: &'a Index) -> Mapper<'a> {
        Mapper {
            index,
            forward: PaddedRead::default(),
            backward: PaddedRead::default(),
            extension: Extension::default(),
            seeds: Vec::new(),
            hits: Vec::new(),
            candidates: Vec::new(),
            starts: Vec::new(),
        }
    }

    /// Best place of a read, given in letters as sequenced; `None` if there is no alignment within
    /// [`edit_bound`]. Letters other than A, C, G and T (of either case) match nothing.
    pub fn map(&mut self, bases: &[u8]) -> Option<Alignment> {
        let bound = edit_bound(bases.len())?;
        self.forward
            .fill(bases.iter().map(|&letter| code(letter, READ_OTHER)));
        self.backward.fill(
            self.forward
                .codes()
                .iter()
                .rev()
                .map(|&code| complement_code(code)),
        );
        // Each of them costs an edit wherever the read lies.
        if self
            .forward
            .codes()
            .iter()
            .filter(|&&code| code == READ_OTHER)
            .count()
            > bound
        {
            return None;
        }
        self.candidates.clear();
        self.find_candidates(false, bound);
        self.find_candidates(true, bound);
        let distance = self.find_starts(bound)?;
        self.answer(distance)
    }

    /// Groups the hits of one strand's seeds into candidates.
    fn find_candidates(&mut self, reverse: bool, bound: usize) {
        let read = if reverse {
            &self.backward
        } else {
            &self.forward
        };
        self.seeds.clear();
        for (block, bases) in read.codes().chunks_exact(SEED).enumerate() {
            // A seed with an N in it is nowhere, and a good one to choose: it costs nothing.
            let positions = seed_code(bases).map_or(&[][..], |seed| self.index.positions(seed));
            self.seeds.push(Seed {
                offset: block * SEED,
                positions,
            });
        }
        // Any `bound + 1` disjoint seeds will do: those with the fewest places are the cheapest.
        if self.seeds.len() > bound + 1 {
            self.seeds.sort_by_key(|seed| seed.positions.len());
            self.seeds.truncate(bound + 1);
        }
        self.hits.clear();
        for seed in &self.seeds {
            self.hits.extend(seed.positions.iter().map(|&position| Hit {
                reference: self.index.references().at(position as usize),
                diagonal: i64::from(position) - seed.offset as i64,
            }));
        }
        self.hits.sort_unstable();
        let mut open: Option<Candidate> = None;
        for hit in &self.hits {
            match &mut open {
                // Seeds of one alignment are at most `bound` diagonals apart.
                Some(candidate)
                    if candidate.reference == hit.reference
                        && hit.diagonal - candidate.last <= bound as i64 =>
                {
                    candidate.last = hit.diagonal;
                    candidate.hits += 1;
                }
                _ => {
                    self.candidates.extend(open.replace(Candidate {
                        reverse,
                        reference: hit.reference,
                        first: hit.diagonal,
                        last: hit.diagonal,
                        hits: 1,
                    }));
                }
            }
        }
        self.candidates.extend(open);
    }

    /// Leaves all optimal starts in `starts`; returns their distance.
    fn find_starts(&mut self, bound: usize) -> Option<usize> {
        self.starts.clear();
        // The richest candidate is most likely the best one, and a low limit makes the others
        // cheap.
        if let Some(richest) = (0..self.candidates.len()).max_by_key(|&i| self.candidates[i].hits) {
            self.candidates.swap(0, richest);
        }
        let mut best = None;
        for &Candidate {
            reverse,
            reference,
            first,
            last,
            hits,
        } in &self.candidates
        {
            let limit = best.unwrap_or(bound);
            // `limit` edits leave at least this many of the `bound + 1` seeds unchanged.
            if hits < bound + 1 - limit {
                continue;
            }
            let read = if reverse {
                &self.backward
            } else {
                &self.forward
            };
            let search = Search::new(self.index.references(), reference, read);
            let band = first - limit as i64..=last + limit as i64;
            let Some(distance) = self.extension.distance(&search, band, limit) else {
                continue;
            };
            if best.is_none_or(|best| distance < best) {
                self.starts.clear();
                best = Some(distance);
            }
            let starts = self.extension.starts();
            self.starts.extend(starts.map(|text| Start {
                reference,
                text,
                reverse,
            }));
        }
        best
    }

    /// The first of the optimal starts, in full.
    fn answer(&mut self, distance: usize) -> Option<Alignment> {
        let &Start {
            reference,
            text,
            reverse,
        } = self.starts.iter().min()?;
        self.starts
            .sort_unstable_by_key(|start| (start.reverse, start.reference, start.text));
        // Bands of neighbouring candidates overlap, so a start may be there twice.
        let locations = self.starts.chunk_by(|a, b| {
            (a.reverse, a.reference) == (b.reverse, b.reference) && b.text - a.text <= distance
        });
        let locations = locations.count();

        // The table now holds the last candidate, which need not be the best: once more.
        let read = if reverse {
            &self.backward
        } else {
            &self.forward
        };
        let search = Search::new(self.index.references(), reference, read);
        let band = text as i64 - distance as i64..=text as i64 + distance as i64;
        self.extension.distance(&search, band, distance)?;
        Some(Alignment {
            reference,
            position: text - search.start,
            reverse,
            distance: distance as u32,
            cigar: self.extension.cigar(&search, text),
            locations,
        })
    }
}
