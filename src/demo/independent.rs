//! A second opinion on a sample of reads, by a program that shares nothing with the mapper.
//!
//! rust-bio reads the FASTA and runs Myers' bit-vector algorithm for each sampled read over the
//! whole of every reference and both strands: no index, no seeds, no candidates. It must find the
//! same smallest distance; the position that was reported must be one with that distance; and a
//! read is unmapped exactly when the distance is beyond its edit bound.
//!
//! Both strings are searched reversed: where an alignment ends on the reversed text is where it
//! starts on the text, so that starting positions are found without a traceback.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use bio::io::fasta;
use bio::pattern_matching::myers::{Myers, long};
use forkvm_read_mapper::edit_bound;
use forkvm_read_mapper::fastq::{FastqError, Record, Records};
use indicatif::ProgressBar;
use rand::SeedableRng;
use rand_chacha::ChaCha12Rng;

use super::sam::{Line, Place, lines};

/// Bases that Myers' algorithm takes in one machine word.
const WORD: usize = 64;

/// How many reads to check, and which.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// Number of reads; all of them if there are fewer.
    pub count: usize,
    /// Seed of the choice.
    pub seed: u64,
}

/// Checks a sample of the records; returns how many were checked. `records` has one SAM line per
/// read of `fastq`, in its order. `progress` advances by one with each read.
///
/// # Errors
/// Input that cannot be read; the first read, by its place in the input, that was answered wrong.
pub fn check(
    fasta: &[u8],
    fastq: &[u8],
    records: &[u8],
    sample: Sample,
    threads: usize,
    progress: &ProgressBar,
) -> Result<usize, CheckError> {
    let references = reversed_references(fasta)?;
    let reads = Records::new(fastq).collect::<Result<Vec<_>, _>>()?;
    let records: Vec<&[u8]> = lines(records).collect();
    if reads.len() != records.len() {
        return Err(CheckError::Count {
            reads: reads.len(),
            records: records.len(),
        });
    }
    let mut random = ChaCha12Rng::seed_from_u64(sample.seed);
    let count = sample.count.min(reads.len());
    let chosen = rand::seq::index::sample(&mut random, reads.len(), count).into_vec();
    let next = AtomicUsize::new(0);
    let work = || {
        let mut wrong = Vec::new();
        while let Some(&read) = chosen.get(next.fetch_add(1, Ordering::Relaxed)) {
            wrong.extend(check_read(&references, &reads[read], records[read]).err());
            progress.inc(1);
        }
        wrong
    };
    let mut wrong = Vec::new();
    std::thread::scope(|scope| {
        let started: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        wrong.extend(work());
        for thread in started {
            match thread.join() {
                Ok(results) => wrong.extend(results),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
    });
    wrong.sort_by(|a: &WrongAnswer, b| a.read.cmp(&b.read));
    match wrong.into_iter().next() {
        Some(first) => Err(CheckError::Wrong(first)),
        None => Ok(count),
    }
}

/// A reference from its last base to its first.
struct Reversed {
    name: String,
    text: Vec<u8>,
}

fn reversed_references(fasta: &[u8]) -> Result<Vec<Reversed>, CheckError> {
    let records = fasta::Reader::new(fasta).records();
    let reversed = records.map(|record| {
        let record = record.map_err(|source| CheckError::Fasta {
            reason: source.to_string(),
        })?;
        let text = record
            .seq()
            .iter()
            .rev()
            .map(|&base| base_or(base, b'#'))
            .collect();
        Ok(Reversed {
            name: record.id().to_string(),
            text,
        })
    });
    reversed.collect()
}

/// A base in upper case; `other` for what is none. Reads and references use different ones.
fn base_or(letter: u8, other: u8) -> u8 {
    let letter = letter.to_ascii_uppercase();
    if b"ACGT".contains(&letter) {
        letter
    } else {
        other
    }
}

fn check_read(references: &[Reversed], read: &Record<'_>, line: &[u8]) -> Result<(), WrongAnswer> {
    let wrong = |expected: String| WrongAnswer {
        read: String::from_utf8_lossy(read.name).into_owned(),
        expected,
        found: String::from_utf8_lossy(line).into_owned(),
    };
    let answer = Line::parse(line).ok_or_else(|| wrong("a line of SAM with an NM tag".into()))?;
    if answer.name.as_bytes() != read.name {
        return Err(wrong("the read's own name".into()));
    }
    let best = best_places(references, read.bases);
    match (best.first(), answer.place) {
        (None, None) => Ok(()),
        (Some(_), Some(found)) if best.contains(&found) => Ok(()),
        (None, Some(_)) => Err(wrong("unmapped: no place is within the edit bound".into())),
        (Some(place), _) => Err(wrong(format!("{place:?}, or another with this distance"))),
    }
}

/// All places with the smallest distance, if that is within the read's edit bound.
fn best_places<'a>(references: &'a [Reversed], bases: &[u8]) -> Vec<Place<'a>> {
    let Some(bound) = edit_bound(bases.len()) else {
        return Vec::new();
    };
    let read: Vec<u8> = bases.iter().map(|&base| base_or(base, b'N')).collect();
    let mut best = bound;
    let mut places: Vec<Place<'a>> = Vec::new();
    // The complement of a read is its reverse complement reversed, which is what is needed here.
    let complement = bio::alphabets::dna::complement;
    let backward: Vec<u8> = read.iter().map(|&base| complement(base)).collect();
    let forward: Vec<u8> = read.into_iter().rev().collect();
    for (reverse, pattern) in [(false, forward), (true, backward)] {
        for reference in references {
            let Reversed { name, text } = reference;
            for (end, distance) in ends(&pattern, text, best) {
                if distance < best {
                    places.clear();
                    best = distance;
                }
                if distance == best {
                    let position = text.len() - 1 - end;
                    places.push(Place {
                        reference: name,
                        position,
                        reverse,
                        distance,
                    });
                }
            }
        }
    }
    places
}

/// Last base (on the given text) and distance of all alignments within `limit`.
///
/// A long read is searched in two steps, for speed: an alignment of the whole holds one of its
/// first 64 bases, with no more edits, and those are searched over the whole text first.
fn ends(pattern: &[u8], text: &[u8], limit: usize) -> Vec<(usize, usize)> {
    let head = &pattern[..pattern.len().min(WORD)];
    // The limit is a few edits.
    let heads = Myers::<u64>::new(head);
    let heads = heads.find_all_end(text, limit as u8);
    if head.len() == pattern.len() {
        return heads
            .map(|(end, distance)| (end, usize::from(distance)))
            .collect();
    }
    let mut windows: Vec<Range<usize>> = Vec::new();
    for (end, _) in heads {
        let start = (end + 1).saturating_sub(head.len() + limit);
        let stop = text.len().min(end + 1 + pattern.len() - head.len() + limit);
        match windows.last_mut() {
            Some(last) if start <= last.end => last.end = stop,
            _ => windows.push(start..stop),
        }
    }
    let whole = long::Myers::<u64>::new(pattern);
    let in_window = |window: Range<usize>| {
        let found = whole
            .find_all_end(&text[window.clone()], limit)
            .collect::<Vec<_>>();
        found
            .into_iter()
            .map(move |(end, distance)| (window.start + end, distance))
    };
    windows.into_iter().flat_map(in_window).collect()
}

/// Why the sample could not be checked, or that it was answered wrong.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// The references are not FASTA.
    #[error("cannot read the references for the independent check: {reason}")]
    Fasta {
        /// What the reader said.
        reason: String,
    },
    /// The reads are not FASTQ.
    #[error("cannot read the reads for the independent check: {0}")]
    Fastq(#[from] FastqError),
    /// A read has no record, or a record no read.
    #[error("{records} records for {reads} reads; every read has one")]
    Count {
        /// Number of reads.
        reads: usize,
        /// Number of records.
        records: usize,
    },
    /// An answer is wrong.
    #[error(transparent)]
    Wrong(WrongAnswer),
}

/// A read that was answered otherwise than Myers' algorithm answers.
#[derive(Debug, thiserror::Error)]
#[error(
    "read '{read}' was mapped wrong, says Myers' algorithm over the whole references\n  \
     expected: {expected}\n  found:    {found}"
)]
pub struct WrongAnswer {
    /// Name of the read.
    pub read: String,
    /// What would be right.
    pub expected: String,
    /// The SAM line.
    pub found: String,
}

#[cfg(test)]
mod tests {
    use super::*;
    use forkvm_read_mapper::{Index, Mapper, References, sam};
    use rand::Rng;

    fn random_bases(random: &mut ChaCha12Rng, len: usize) -> Vec<u8> {
        (0..len)
            .map(|_| b"ACGT"[random.random_range(0..4)])
            .collect()
    }

    /// Two references and reads of all lengths, right and wrong strands, strangers and Ns.
    fn job() -> (Vec<u8>, Vec<u8>) {
        let mut random = ChaCha12Rng::seed_from_u64(19);
        let first = random_bases(&mut random, 3000);
        let mut second = random_bases(&mut random, 900);
        second[400] = b'N';
        let fasta = [
            b">a\n",
            first.as_slice(),
            b"\n>b title\n",
            second.as_slice(),
            b"\n",
        ]
        .concat();
        let mut fastq = Vec::new();
        for number in 0..300 {
            let len = random.random_range(1..200);
            let from = if number % 3 == 0 { &second } else { &first };
            let start = random.random_range(0..=from.len() - len);
            let mut read = from[start..start + len].to_vec();
            for _ in 0..random.random_range(0..9) {
                let at = random.random_range(0..len);
                read[at] = b"ACGTN"[random.random_range(0..5)];
            }
            if number % 2 == 0 {
                read = bio::alphabets::dna::revcomp(read);
            }
            if number % 10 == 0 {
                read = random_bases(&mut random, len);
            }
            let qualities = vec![b'I'; read.len()];
            let title = format!("@r{number}\n");
            let parts: [&[u8]; 5] = [title.as_bytes(), &read, b"\n+\n", &qualities, b"\n"];
            fastq.extend(parts.concat());
        }
        (fasta, fastq)
    }

    fn map(fasta: &[u8], fastq: &[u8]) -> Vec<u8> {
        let index = Index::build(References::from_fasta(fasta).unwrap());
        let mut mapper = Mapper::new(&index);
        let mut text = Vec::new();
        for record in Records::new(fastq) {
            let record = record.unwrap();
            let alignment = mapper.map(record.bases);
            sam::write_record(&mut text, index.references(), &record, alignment.as_ref());
        }
        text
    }

    fn check_all(fasta: &[u8], fastq: &[u8], records: &[u8]) -> Result<usize, CheckError> {
        let sample = Sample {
            count: usize::MAX,
            seed: 1,
        };
        check(fasta, fastq, records, sample, 2, &ProgressBar::hidden())
    }

    #[test]
    fn what_the_mapper_says_is_found_right() {
        let (fasta, fastq) = job();
        let records = map(&fasta, &fastq);
        assert_eq!(check_all(&fasta, &fastq, &records).unwrap(), 300);
        let unmapped = lines(&records).filter(|line| Line::parse(line).unwrap().place.is_none());
        assert!((30..200).contains(&unmapped.count()));
    }

    #[test]
    fn a_wrong_position_strand_distance_or_reference_is_found() {
        let (fasta, fastq) = job();
        let records = map(&fasta, &fastq);
        let exact = lines(&records)
            .find(|line| line.ends_with(b"NM:i:0"))
            .unwrap();
        let good = String::from_utf8(exact.to_vec()).unwrap();
        let fields: Vec<&str> = good.split('\t').collect();
        let read = format!("@{}\n{}\n+\n{}\n", fields[0], fields[9], fields[10]);
        // SEQ stands on the forward strand.
        let with = |field: usize, value: &str| {
            let mut fields = fields.clone();
            fields[1] = if field == 1 { fields[1] } else { "0" };
            fields[field] = value;
            format!("{}\n", fields.join("\t"))
        };
        let check = |line: &str| check_all(&fasta, read.as_bytes(), line.as_bytes());
        assert_eq!(check(&with(1, "0")).unwrap(), 1);
        let other = if fields[2] == "a" { "b" } else { "a" };
        let position = (fields[3].parse::<usize>().unwrap() + 1).to_string();
        for (field, value) in [
            (0, "other"),
            (1, "16"),
            (1, "4"),
            (2, other),
            (3, &position),
            (11, "NM:i:1"),
        ] {
            let error = check(&with(field, value)).unwrap_err();
            assert!(
                matches!(error, CheckError::Wrong(_)),
                "{field} {value}: {error}"
            );
        }
    }

    #[test]
    fn a_mapped_stranger_is_found() {
        let (fasta, _) = job();
        let stranger = b"@r\nAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA\n+\nIIIIIIIIIIIIIIIIIIIIIIIIIIIIII\n";
        let line = b"r\t0\ta\t1\t60\t30M\t*\t0\t0\tA\tI\tNM:i:1\n";
        let error = check_all(&fasta, stranger, line).unwrap_err();
        assert!(matches!(error, CheckError::Wrong(_)), "{error}");
    }

    #[test]
    fn the_search_in_two_steps_finds_what_one_search_finds() {
        let mut random = ChaCha12Rng::seed_from_u64(23);
        let unit = random_bases(&mut random, 90);
        let text = [unit.repeat(4), random_bases(&mut random, 300), unit].concat();
        for len in [65, 100, 180] {
            for start in (0..text.len() - len).step_by(11) {
                let mut pattern = text[start..start + len].to_vec();
                pattern.remove(len / 3);
                pattern[len / 2] = b'N';
                let whole = long::Myers::<u64>::new(pattern.as_slice());
                let one: Vec<_> = whole.find_all_end(&text, 5).collect();
                assert!(!one.is_empty());
                assert_eq!(ends(&pattern, &text, 5), one);
            }
        }
    }

    #[test]
    fn a_missing_record_is_found() {
        let (fasta, fastq) = job();
        let error = check_all(&fasta, &fastq, b"").unwrap_err();
        assert!(
            matches!(
                error,
                CheckError::Count {
                    reads: 300,
                    records: 0
                }
            ),
            "{error}"
        );
    }
}
