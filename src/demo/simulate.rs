//! Reads drawn from a genome by a seed, with the errors of a sequencer.
//!
//! The origin of each read is in its name, so that anybody can see whether it was mapped to where
//! it came from. The same genome, count and seed give the same bytes on every machine (ChaCha12,
//! whose stream is fixed by its specification).

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha12Rng;

/// Bases of each read.
pub const READ_LEN: usize = 100;

/// Chance of a substituted base at the first and at the last cycle; 1 % on average, and more
/// towards the end as on a real machine.
const SUBSTITUTION: (f64, f64) = (0.002, 0.018);

/// Chance, per base, that one is inserted before it, and the same that it is left out.
const INSERTION: f64 = 0.0005;
const DELETION: f64 = 0.0005;

/// Phred scores of right and of wrong bases.
const GOOD_QUALITY: std::ops::RangeInclusive<u8> = 28..=40;
const BAD_QUALITY: std::ops::RangeInclusive<u8> = 2..=20;

/// What to draw.
#[derive(Clone, Copy, Debug)]
pub struct Simulation {
    /// Seed of the random numbers; print it beside every result.
    pub seed: u64,
    /// Number of reads.
    pub count: usize,
}

/// Where a simulated read comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// Leftmost base of the genome that it was drawn from, counted from 0.
    pub position: usize,
    /// It was drawn from the reverse strand.
    pub reverse: bool,
}

impl Origin {
    /// The origin that a name `ecoli_<n>_<position>_<+ or ->` tells; `None` for other names.
    pub fn of_name(name: &str) -> Option<Origin> {
        let (rest, strand) = name.strip_prefix("ecoli_")?.rsplit_once('_')?;
        let (_, position) = rest.rsplit_once('_')?;
        let reverse = match strand {
            "+" => false,
            "-" => true,
            _ => return None,
        };
        Some(Origin {
            position: position.parse().ok()?,
            reverse,
        })
    }
}

impl Simulation {
    /// The reads, as FASTQ text. `genome` is in upper-case letters.
    ///
    /// # Errors
    /// A genome that is shorter than twice [`READ_LEN`].
    pub fn fastq(&self, genome: &[u8]) -> Result<Vec<u8>, GenomeTooShort> {
        if genome.len() < 2 * READ_LEN {
            return Err(GenomeTooShort { len: genome.len() });
        }
        let mut random = ChaCha12Rng::seed_from_u64(self.seed);
        let mut text = Vec::with_capacity(self.count * (2 * READ_LEN + 32));
        for number in 0..self.count {
            // Twice the length, so that deletions do not run out of bases.
            let start = random.random_range(0..=genome.len() - 2 * READ_LEN);
            let fragment = &genome[start..start + 2 * READ_LEN];
            let reverse = random.random();
            let read = if reverse {
                sequence(
                    &mut random,
                    fragment.iter().rev().map(|&base| complement(base)),
                )
            } else {
                sequence(&mut random, fragment.iter().copied())
            };
            let position = if reverse {
                start + 2 * READ_LEN - read.consumed
            } else {
                start
            };
            let strand = if reverse { '-' } else { '+' };
            let title = format!("@ecoli_{number}_{position}_{strand}\n");
            text.extend_from_slice(title.as_bytes());
            text.extend_from_slice(&read.bases);
            text.extend_from_slice(b"\n+\n");
            text.extend_from_slice(&read.qualities);
            text.push(b'\n');
        }
        Ok(text)
    }
}

struct Sequenced {
    bases: Vec<u8>,
    qualities: Vec<u8>,
    /// Bases of the fragment that the read stands for.
    consumed: usize,
}

/// Reads [`READ_LEN`] bases off a fragment, with errors.
fn sequence(random: &mut ChaCha12Rng, fragment: impl Iterator<Item = u8>) -> Sequenced {
    let mut read = Sequenced {
        bases: Vec::new(),
        qualities: Vec::new(),
        consumed: 0,
    };
    for base in fragment {
        if read.bases.len() < READ_LEN && random.random_bool(INSERTION) {
            let inserted = b"ACGT"[random.random_range(0..4)];
            read.push(inserted, random.random_range(BAD_QUALITY));
        }
        if read.bases.len() >= READ_LEN {
            break;
        }
        read.consumed += 1;
        if random.random_bool(DELETION) {
            continue;
        }
        let cycle = read.bases.len() as f64 / READ_LEN as f64;
        let wrong = SUBSTITUTION.0 + (SUBSTITUTION.1 - SUBSTITUTION.0) * cycle;
        if random.random_bool(wrong) {
            let others: Vec<u8> = b"ACGT"
                .iter()
                .copied()
                .filter(|&other| other != base)
                .collect();
            let substituted = others[random.random_range(0..others.len())];
            read.push(substituted, random.random_range(BAD_QUALITY));
        } else {
            read.push(base, random.random_range(GOOD_QUALITY));
        }
    }
    read
}

impl Sequenced {
    fn push(&mut self, base: u8, phred: u8) {
        self.bases.push(base);
        self.qualities.push(phred + 33);
    }
}

fn complement(base: u8) -> u8 {
    match base {
        b'A' => b'T',
        b'C' => b'G',
        b'G' => b'C',
        b'T' => b'A',
        other => other,
    }
}

/// Reads cannot be drawn from so little.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot draw reads of {READ_LEN} bases from a genome of {len}; it needs at least {}: is the \
     FASTA file complete?",
    2 * READ_LEN
)]
pub struct GenomeTooShort {
    /// Bases of the genome.
    pub len: usize,
}

#[cfg(test)]
mod tests {
    use super::*;
    use forkvm_read_mapper::fastq::Records;

    fn genome(len: usize) -> Vec<u8> {
        let mut random = ChaCha12Rng::seed_from_u64(7);
        (0..len)
            .map(|_| b"ACGT"[random.random_range(0..4)])
            .collect()
    }

    #[test]
    fn the_same_seed_gives_the_same_reads_and_another_seed_gives_others() {
        let genome = genome(5000);
        let draw = |seed| Simulation { seed, count: 50 }.fastq(&genome).unwrap();
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
    }

    #[test]
    fn reads_are_close_to_the_origin_in_their_name_and_have_one_percent_of_errors() {
        let genome = genome(20_000);
        let text = Simulation {
            seed: 3,
            count: 2000,
        }
        .fastq(&genome)
        .unwrap();
        let (mut reverse, mut compared, mut differing, mut bases) = (0, 0, 0, 0);
        for record in Records::new(&text) {
            let record = record.unwrap();
            assert_eq!(record.bases.len(), READ_LEN);
            let name = std::str::from_utf8(record.name).unwrap();
            let origin = Origin::of_name(name).unwrap();
            reverse += usize::from(origin.reverse);
            let mut read = record.bases.to_vec();
            if origin.reverse {
                read = read.iter().rev().map(|&base| complement(base)).collect();
            }
            let there = &genome[origin.position..origin.position + READ_LEN];
            let differ = read.iter().zip(there).filter(|(a, b)| a != b).count();
            // An inserted or deleted base shifts the rest, so that most of it differs.
            if differ < 10 {
                compared += 1;
                differing += differ;
                bases += READ_LEN;
            }
        }
        assert!(
            (900..1100).contains(&reverse),
            "{reverse} of 2000 on the reverse strand"
        );
        assert!(
            compared > 1700,
            "{compared} of 2000 without insertion or deletion"
        );
        let percent = 100.0 * differing as f64 / bases as f64;
        assert!((0.8..1.3).contains(&percent), "{percent} % of bases differ");
    }

    #[test]
    fn only_names_of_simulated_reads_have_an_origin() {
        let origin = Origin {
            position: 17,
            reverse: true,
        };
        assert_eq!(Origin::of_name("ecoli_3_17_-"), Some(origin));
        for other in ["r1/1", "ecoli_3_17", "ecoli_3_x_+", "ecoli_3_17_*", ""] {
            assert_eq!(Origin::of_name(other), None, "{other}");
        }
    }

    #[test]
    fn a_genome_too_short_to_draw_from_is_refused() {
        assert!(
            Simulation { seed: 1, count: 1 }
                .fastq(&genome(199))
                .is_err()
        );
        assert!(Simulation { seed: 1, count: 1 }.fastq(&genome(200)).is_ok());
    }
}
