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
