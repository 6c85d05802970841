//! Where in the references each 12-mer occurs.
//!
//! A direct-address table in compressed sparse row form: `offsets[c]..offsets[c + 1]` is the part
//! of `positions` that lists the occurrences of the 12-mer with code `c`, in ascending order. The
//! table costs 64 MiB and 4 bytes per reference base. It is two plain vectors: built once, then
//! only read, so forks of the process or machine that built it inherit it without a copy.

use alloc::vec;
use alloc::vec::Vec;

use crate::references::References;

/// Bases of a seed.
pub const SEED: usize = 12;

const CODES: usize = 1 << (2 * SEED);

/// The references and where their 12-mers are.
#[derive(Clone, Debug)]
pub struct Index {
    references: References,
    offsets: Vec<u32>,
    positions: Vec<u32>,
}

impl Index {
    /// Indexes the references; takes two passes over them and one over the table.
    pub fn build(references: References) -> Index {
        let mut offsets = vec![0u32; CODES + 1];
        let mut total = 0u32;
        for_each_seed_backwards(references.text(), |_, seed| {
            offsets[seed] += 1;
            total += 1;
        });
        let mut end = 0;
        for offset in &mut offsets {
            end += *offset;
            *offset = end;
        }
        // Each offset is now the end of its list. Filling from the end, backwards over the text,
        // turns it into the list's start and leaves the list ascending.
        let mut positions = vec![0u32; total as usize];
        for_each_seed_backwards(references.text(), |position, seed| {
            offsets[seed] -= 1;
            // The FASTA parser keeps the text shorter than u32::MAX.
            positions[offsets[seed] as usize] = position as u32;
        });
        Index {
            references,
            offsets,
            positions,
        }
    }

    /// The references that were indexed.
    pub fn references(&self) -> &References {
        &self.references
    }

    /// Size of the index in bytes, the references' text included.
    pub fn size(&self) -> usize {
        (self.offsets.len() + self.positions.len()) * size_of::<u32>()
            + self.references.text().len()
    }

    /// Text positions where the 12-mer with this code starts.
    pub(crate) fn positions(&self, seed: usize) -> &[u32] {
        &self.positions[self.offsets[seed] as usize..self.offsets[seed + 1] as usize]
    }
}

/// Code of a 12-mer; `None` if one of its bases is not A, C, G or T.
pub(crate) fn seed_code(bases: &[u8]) -> Option<usize> {
    bases.iter().try_fold(0, |seed, &base| {
        (base < 4).then(|| seed << 2 | usize::from(base))
    })
}

/// Calls `visit(position, code)` for every 12-mer of four bases only, the last one first.
fn for_each_seed_backwards(text: &[u8], mut visit: impl FnMut(usize, usize)) {
    let mut seed = 0;
    let mut bases = 0;
    for (position, &base) in text.iter().enumerate().rev() {
        if base >= 4 {
            bases = 0;
            continue;
        }
        seed = seed >> 2 | usize::from(base) << (2 * (SEED - 1));
        bases += 1;
        if bases >= SEED {
            visit(position, seed);
        }
    }
}
