//! What the guests should have written: the same algorithm, run by the host over all reads.
//!
//! The guests and the host run the same crate, so their lines must be equal byte by byte; a
//! difference is a fault of the machine that ran it (memory, disk, vCPU state), not of mapping.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use forkvm_read_mapper::fastq::{FastqError, Records, record_start};
use forkvm_read_mapper::{Index, Mapper, sam};
use indicatif::ProgressBar;

use super::sam::lines;

/// Bytes of FASTQ that a thread takes at a time.
const PIECE: usize = 1 << 20;

/// Maps all reads of a FASTQ text, on `threads` threads; returns their SAM lines in the order of
/// the reads. `progress` advances by the bytes read.
///
/// # Errors
/// A record that is not FASTQ.
pub fn map_all(
    index: &Index,
    fastq: &[u8],
    threads: usize,
    progress: &ProgressBar,
) -> Result<Vec<u8>, FastqError> {
    let pieces = pieces(fastq);
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        let mut mapper = Mapper::new(index);
        while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
            done.push((piece.start, map_piece(index, &mut mapper, fastq, piece)));
            progress.inc(piece.len() as u64);
        }
        done
    };
    let mut done = Vec::new();
    std::thread::scope(|scope| {
        let started: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        done.extend(work());
        for thread in started {
            match thread.join() {
                Ok(results) => done.extend(results),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
    });
    done.sort_by_key(|(start, _)| *start);
    let texts: Result<Vec<Vec<u8>>, FastqError> = done.into_iter().map(|(_, text)| text).collect();
    Ok(texts?.concat())
}

/// Cuts at record boundaries.
fn pieces(fastq: &[u8]) -> Vec<Range<usize>> {
    let mut pieces = Vec::new();
    let mut start = 0;
    while start < fastq.len() {
        let end = record_start(fastq, start + PIECE).unwrap_or(fastq.len());
        pieces.push(start..end);
        start = end;
    }
    pieces
}

fn map_piece(
    index: &Index,
    mapper: &mut Mapper<'_>,
    fastq: &[u8],
    piece: &Range<usize>,
) -> Result<Vec<u8>, FastqError> {
    let mut text = Vec::with_capacity(piece.len() * 3 / 2);
    for record in Records::new(&fastq[piece.clone()]) {
        let record = record.map_err(|error| FastqError {
            offset: error.offset + piece.start,
            kind: error.kind,
        })?;
        let alignment = mapper.map(record.bases);
        sam::write_record(&mut text, index.references(), &record, alignment.as_ref());
    }
    Ok(text)
}

/// Compares line by line; returns the number of lines.
///
/// # Errors
/// The first line that differs.
pub fn compare(expected: &[u8], found: &[u8]) -> Result<usize, Difference> {
    let (mut expected, mut found) = (lines(expected), lines(found));
    let text = |line: Option<&[u8]>| {
        line.map_or("no line".into(), |line| {
            String::from_utf8_lossy(line).into_owned()
        })
    };
    let mut line = 0;
    loop {
        let (a, b) = (expected.next(), found.next());
        if a != b {
            return Err(Difference {
                line,
                expected: text(a),
                found: text(b),
            });
        }
        if a.is_none() {
            return Ok(line);
        }
        line += 1;
    }
}

/// A line of the guests that is not the host's.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "record {line} of the guests is not the host's\n  expected: {expected}\n  found:    {found}"
)]
pub struct Difference {
    /// Number of the line, from 0.
    pub line: usize,
    /// The host's.
    pub expected: String,
    /// The guests'.
    pub found: String,
}

#[cfg(test)]
mod tests {
    use super::super::simulate::Simulation;
    use super::*;
    use forkvm_read_mapper::References;
    use forkvm_read_mapper::fastq::ErrorKind;
    use rand::{Rng, SeedableRng};

    /// A small genome, its index, and more reads than fit one piece.
    fn job() -> (Index, Vec<u8>) {
        let mut random = rand_chacha::ChaCha12Rng::seed_from_u64(11);
        let genome: Vec<u8> = (0..4000)
            .map(|_| b"ACGT"[random.random_range(0..4)])
            .collect();
        let fasta = [b">chr\n", genome.as_slice(), b"\n"].concat();
        let fastq = Simulation {
            seed: 5,
            count: 12_000,
        }
        .fastq(&genome)
        .unwrap();
        assert!(fastq.len() > 2 * PIECE);
        (Index::build(References::from_fasta(&fasta).unwrap()), fastq)
    }

    #[test]
    fn any_number_of_threads_gives_the_same_lines_in_the_order_of_the_reads() {
        let (index, fastq) = job();
        let one = map_all(&index, &fastq, 1, &ProgressBar::hidden()).unwrap();
        let three = map_all(&index, &fastq, 3, &ProgressBar::hidden()).unwrap();
        assert_eq!(compare(&one, &three), Ok(12_000));
        let number = |line: &[u8]| {
            let name = String::from_utf8_lossy(line).into_owned();
            name.split('_')
                .nth(1)
                .map(|number| number.parse::<usize>().unwrap())
        };
        assert!(lines(&one).map(number).eq((0..12_000).map(Some)));
    }

    #[test]
    fn a_malformed_record_is_named_by_its_place_in_the_whole_text() {
        let (index, mut fastq) = job();
        let offset = fastq.len();
        fastq.extend_from_slice(b"@r\nACGT\n+\nII\n");
        let error = map_all(&index, &fastq, 2, &ProgressBar::hidden()).unwrap_err();
        assert_eq!(
            (error.offset, error.kind),
            (offset, ErrorKind::UnequalLength)
        );
    }

    #[test]
    fn the_first_different_or_missing_line_is_told() {
        assert_eq!(compare(b"", b""), Ok(0));
        assert_eq!(compare(b"a\nb\n", b"a\nb\n"), Ok(2));
        let difference = compare(b"a\nb\n", b"a\nc\n").unwrap_err();
        assert_eq!((difference.line, difference.found.as_str()), (1, "c"));
        let difference = compare(b"a\nb\n", b"a\n").unwrap_err();
        assert_eq!((difference.line, difference.found.as_str()), (1, "no line"));
        let difference = compare(b"a\n", b"a\nb\n").unwrap_err();
        assert_eq!(
            (difference.line, difference.expected.as_str()),
            (1, "no line")
        );
    }
}
