//! Judges what the guests wrote, and keeps it as one SAM file.

use std::path::Path;

use forkvm_read_mapper::fastq::FastqError;
use forkvm_read_mapper::sam::write_header;
use indicatif::ProgressBar;
use serde::Serialize;

use super::expected;
use super::independent::{self, CheckError, Sample};
use super::input::Input;
use super::sam::{self, WriteError, lines, placed_percent};

/// So many percent of the simulated reads must be mapped to where they were drawn.
pub const PLACED_AT_LEAST: f64 = 95.0;

/// The part of the demo's JSON that is about answers.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Answers {
    /// Every record is the host's, and the independent check found nothing wrong.
    pub answers_match: bool,
    /// Number of records the guests wrote.
    pub records: usize,
    /// Share of the simulated reads that lie where they were drawn; `null` without such reads.
    pub simulated_placed_percent: Option<f64>,
    /// Number of reads that the independent path agreed on.
    pub independent_checks: usize,
    /// For people: what is wrong; empty if nothing is.
    #[serde(skip)]
    pub failures: Vec<String>,
}

/// Judges the record texts of all clones, given in the order of their shares, and writes them as
/// one file to `sam_file`, right or wrong. Progress bars are shown by the caller's `bar`, which
/// gets a length and a word for each of the two long steps.
///
/// # Errors
/// Input that is not FASTQ; a file that cannot be written. Wrong answers are not an error here:
/// they are in [`Answers::failures`].
pub fn judge(
    input: &Input,
    shares: &[Vec<u8>],
    sample: Sample,
    threads: usize,
    sam_file: &Path,
    bar: impl Fn(u64, &'static str) -> ProgressBar,
) -> Result<Answers, AnswersError> {
    let mut failures = Vec::new();
    for (share, text) in shares.iter().enumerate() {
        if text.last().is_some_and(|&byte| byte != b'\n') {
            failures.push(format!("the records of share {share} end within a line"));
        }
    }
    let found = shares.concat();
    let mut header = Vec::new();
    write_header(
        &mut header,
        input.index.references(),
        env!("CARGO_PKG_VERSION"),
    );
    sam::write(sam_file, &header, &found)?;

    let progress = bar(input.fastq.len() as u64, "mapping on the host");
    let expected = expected::map_all(&input.index, &input.fastq, threads, &progress)?;
    progress.finish_and_clear();
    failures.extend(
        expected::compare(&expected, &found)
            .err()
            .map(|error| error.to_string()),
    );

    let progress = bar(sample.count as u64, "checking by Myers");
    let checked = independent::check(
        &input.fasta,
        &input.fastq,
        &found,
        sample,
        threads,
        &progress,
    );
    progress.finish_and_clear();
    let independent_checks = match checked {
        Ok(count) => count,
        Err(error @ (CheckError::Wrong(_) | CheckError::Count { .. })) => {
            failures.push(error.to_string());
            0
        }
        Err(error) => return Err(error.into()),
    };
    let answers_match = failures.is_empty();

    let simulated_placed_percent = placed_percent(&found, &input.simulated_from);
    if let Some(percent) = simulated_placed_percent.filter(|&percent| percent < PLACED_AT_LEAST) {
        failures.push(format!(
            "only {percent:.1} % of the simulated reads lie where they were drawn, not \
             {PLACED_AT_LEAST} %"
        ));
    }
    Ok(Answers {
        answers_match,
        records: lines(&found).count(),
        simulated_placed_percent,
        independent_checks,
        failures,
    })
}

/// Why answers could not be judged.
#[derive(Debug, thiserror::Error)]
pub enum AnswersError {
    /// The reads are not FASTQ.
    #[error("cannot map the reads on the host: {0}")]
    Fastq(#[from] FastqError),
    /// The merged records cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The independent check could not be made.
    #[error(transparent)]
    Check(#[from] CheckError),
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use forkvm_read_mapper::Mapper;
    use forkvm_read_mapper::fastq::{Records, record_start};

    use super::super::input::InputSpec;
    use super::super::references::Packaged;
    use super::super::simulate::Simulation;
    use super::*;
    use crate::packaged::PackagedError;

    /// What `clones` guests would write, each its share of the bytes.
    fn shares(input: &Input, clones: usize) -> Vec<Vec<u8>> {
        let fastq = &input.fastq;
        let cut =
            |share: usize| record_start(fastq, fastq.len() * share / clones).unwrap_or(fastq.len());
        let mut mapper = Mapper::new(&input.index);
        let mut share_of = |share: usize| {
            let mut text = Vec::new();
            for record in Records::new(&fastq[cut(share)..cut(share + 1)]) {
                let record = record.unwrap();
                let alignment = mapper.map(record.bases);
                let references = input.index.references();
                forkvm_read_mapper::sam::write_record(
                    &mut text,
                    references,
                    &record,
                    alignment.as_ref(),
                );
            }
            text
        };
        (0..clones).map(&mut share_of).collect()
    }

    fn bar(_: u64, _: &'static str) -> ProgressBar {
        ProgressBar::hidden()
    }

    const SAMPLE: Sample = Sample { count: 8, seed: 4 };

    /// The demo's own input, but fewer reads; `None`, and a line that says so, without packages.
    fn installed(folder: &Path, seed: u64) -> Option<Input> {
        let simulation = Simulation { seed, count: 1500 };
        let packaged = match Packaged::load(Path::new("/")) {
            Err(error @ PackagedError::Missing { .. }) => {
                eprintln!("skipped: {error}");
                return None;
            }
            packaged => packaged.unwrap(),
        };
        let spec = InputSpec {
            simulation,
            lambda_pairs: 250,
        };
        Some(Input::from_packages(&packaged, folder, &spec).unwrap())
    }

    #[test]
    fn real_genomes_are_answered_alike_by_three_paths_and_samtools_takes_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let Some(input) = installed(folder.path(), 1) else {
            return;
        };
        let sam_file = folder.path().join("demo.sam");
        let shares = shares(&input, 5);
        let answers = judge(&input, &shares, SAMPLE, 2, &sam_file, bar).unwrap();
        assert_eq!(answers.failures, Vec::<String>::new());
        assert_eq!((answers.records, answers.independent_checks), (2000, 8));
        assert!(answers.answers_match);
        assert!(answers.simulated_placed_percent.unwrap() >= PLACED_AT_LEAST);

        let report = input.report();
        assert_eq!(
            (report.bases, report.reads, report.references.len()),
            (4_987_422, 2000, 2)
        );

        let samtools = |arguments: &[&str]| Command::new("samtools").args(arguments).output();
        let path = sam_file.to_str().unwrap();
        let Ok(checked) = samtools(&["quickcheck", path]) else {
            eprintln!("samtools skipped: not installed; apt-get install samtools");
            return;
        };
        assert!(
            checked.status.success(),
            "{}",
            String::from_utf8_lossy(&checked.stderr)
        );
        let viewed = samtools(&["view", "-c", path]).unwrap();
        assert_eq!(String::from_utf8_lossy(&viewed.stdout), "2000\n");
        assert_eq!(String::from_utf8_lossy(&viewed.stderr), "");
    }

    #[test]
    fn a_lost_changed_or_misplaced_record_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let Some(input) = installed(folder.path(), 2) else {
            return;
        };
        let sam_file = folder.path().join("demo.sam");
        let good = shares(&input, 2);
        let failures = |shares: &[Vec<u8>]| {
            let answers = judge(&input, shares, SAMPLE, 2, &sam_file, bar).unwrap();
            assert!(!answers.answers_match);
            answers.failures
        };
        assert!(failures(&good[..1])[0].contains("found:    no line"));
        let mut changed = good.clone();
        let last = changed[1].len() - 2;
        changed[1][last] ^= 1;
        assert!(failures(&changed)[0].contains("record 1999 of the guests is not the host's"));
        let swapped = [good[1].clone(), good[0].clone()];
        assert!(failures(&swapped)[0].contains("record 0 of the guests is not the host's"));
        let mut cut = good.clone();
        cut[0].pop();
        assert_eq!(
            failures(&cut)[0],
            "the records of share 0 end within a line"
        );
    }
}
