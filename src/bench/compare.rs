//! Two runs held against each other: what changed beyond noise.
//!
//! Only percentiles of two runs are at hand, and what differs between two runs on a shared machine
//! (where memory lies, what else runs, how the clock ramps) is more than what differs between two
//! samples of one run. So a test that grows more confident with the number of samples would
//! call noise a change. Here a case counts as changed only when its medians are further apart than
//! the wider of the two runs' spreads from p50 to p90, and than [`LEAST_CHANGE`]: then the
//! typical value of one run would have been unusual in the other.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use thiserror::Error;

use super::measure::Unit;
use crate::percentiles::Percentiles;

/// A change of the median below this share of the old one is none.
pub const LEAST_CHANGE: f64 = 0.05;

/// Cases with fewer values than this in either run are not judged.
pub const FEWEST: u64 = 3;

/// What `compare` reads of a report.
#[derive(Clone, Debug, Deserialize)]
pub struct Past {
    /// Version of forkvm.
    pub forkvm: String,
    /// What it ran on, as it was written.
    pub host: Value,
    /// Whether it was stopped early.
    pub partial: bool,
    rows: Vec<PastRow>,
}

#[derive(Clone, Debug, Deserialize)]
struct PastRow {
    scenario: String,
    case: String,
    unit: String,
    #[serde(flatten)]
    percentiles: Percentiles,
}

impl Past {
    /// Reads what `forkvm bench --json` wrote.
    pub fn parse(text: &str) -> Result<Past, NoReport> {
        serde_json::from_str(text).map_err(NoReport)
    }

    /// What makes a comparison with `other` doubtful, for people.
    pub fn doubts(&self, other: &Past) -> Vec<String> {
        let mut doubts = Vec::new();
        for key in ["kvm", "kernel", "cpu_model", "cpus", "memory_mib"] {
            let (old, new) = (&self.host[key], &other.host[key]);
            if old != new {
                doubts.push(format!("the hosts differ: {key} was {old} and is {new}"));
            }
        }
        for (past, which) in [(self, "old"), (other, "new")] {
            if past.partial {
                doubts.push(format!("the {which} run is partial"));
            }
        }
        doubts
    }
}

/// Not a report.
#[derive(Debug, Error)]
#[error("it is not what `forkvm bench --json` writes")]
pub struct NoReport(#[source] serde_json::Error);

/// What became of a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Less than before, beyond noise; of a ratio more.
    Better,
    /// More than before, beyond noise; of a ratio less.
    Worse,
    /// Within noise.
    Same,
    /// Too few values to tell.
    TooFew,
    /// Measured in the new run only.
    OnlyNew,
    /// Measured in the old run only.
    OnlyOld,
}

impl Verdict {
    /// The words for people.
    pub fn as_str(self) -> &'static str {
        match self {
            Verdict::Better => "better",
            Verdict::Worse => "worse",
            Verdict::Same => "same",
            Verdict::TooFew => "too few",
            Verdict::OnlyNew => "only new",
            Verdict::OnlyOld => "only old",
        }
    }
}

/// One case of two runs.
#[derive(Clone, Debug, Serialize)]
pub struct Compared {
    /// Its scenario.
    pub scenario: String,
    /// Its name.
    pub case: String,
    /// In what it is measured.
    pub unit: String,
    /// Median of the old run.
    pub old_p50: Option<f64>,
    /// Median of the new run.
    pub new_p50: Option<f64>,
    /// The new median less the old one, in percent of that.
    pub change_percent: Option<f64>,
    /// How far apart the medians must be to count.
    pub noise: Option<f64>,
    /// What became of it.
    pub verdict: Verdict,
}

/// Holds `new` against `old`, in the order of the old run; what is only new comes last.
pub fn compare(old: &Past, new: &Past) -> Vec<Compared> {
    let same = |one: &PastRow, other: &PastRow| {
        one.scenario == other.scenario && one.case == other.case && one.unit == other.unit
    };
    let mut all: Vec<Compared> = old
        .rows
        .iter()
        .map(|row| judge(Some(row), new.rows.iter().find(|other| same(row, other))))
        .collect();
    let only_new = new
        .rows
        .iter()
        .filter(|row| !old.rows.iter().any(|other| same(row, other)));
    all.extend(only_new.map(|row| judge(None, Some(row))));
    all
}

/// At least one of the two is there.
fn judge(old: Option<&PastRow>, new: Option<&PastRow>) -> Compared {
    let [scenario, case, unit] = old.or(new).map_or_else(Default::default, |row| {
        [&row.scenario, &row.case, &row.unit].map(String::clone)
    });
    let p50 = |row: Option<&PastRow>| row.map(|row| row.percentiles.p50);
    let mut compared = Compared {
        scenario,
        case,
        unit,
        old_p50: p50(old),
        new_p50: p50(new),
        change_percent: None,
        noise: None,
        verdict: if old.is_some() {
            Verdict::OnlyOld
        } else {
            Verdict::OnlyNew
        },
    };
    let more_is_better = compared.unit == Unit::Ratio.as_str();
    if let (Some(old), Some(new)) = (old, new) {
        let (old, new) = (&old.percentiles, &new.percentiles);
        let change = new.p50 - old.p50;
        let spread = |run: &Percentiles| run.p90 - run.p50;
        let noise = spread(old)
            .max(spread(new))
            .max(old.p50.abs() * LEAST_CHANGE);
        compared.change_percent = (old.p50 != 0.0).then(|| 100.0 * change / old.p50.abs());
        compared.noise = Some(noise);
        compared.verdict = match () {
            () if old.n.min(new.n) < FEWEST => Verdict::TooFew,
            () if change.abs() <= noise => Verdict::Same,
            () if (change < 0.0) != more_is_better => Verdict::Better,
            () => Verdict::Worse,
        };
    }
    compared
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn run(kernel: &str, rows: &[(&str, f64, f64, u64)]) -> Past {
        let rows: Vec<Value> = rows
            .iter()
            .map(|&(case, p50, p90, n)| {
                json!({ "scenario": "fork", "case": case, "unit": "us", "p50": p50, "p90": p90, "p99": p90,
                        "min": p50, "max": p90, "n": n, "dirty_mib": 4.0, "kernel": kernel })
            })
            .collect();
        let text = json!({ "forkvm": "0.1.0", "scenario": "fork", "seed": 1, "partial": false,
                           "host": { "kernel": kernel, "cpus": 2 }, "rows": rows });
        Past::parse(&text.to_string()).unwrap()
    }

    fn verdicts(old: &Past, new: &Past) -> Vec<(String, Verdict)> {
        compare(old, new)
            .into_iter()
            .map(|one| (one.case, one.verdict))
            .collect()
    }

    #[test]
    fn only_what_leaves_the_wider_spread_has_changed() {
        let old = run(
            "6.12",
            &[
                ("a", 100.0, 120.0, 50),
                ("b", 100.0, 120.0, 50),
                ("c", 100.0, 101.0, 50),
                ("d", 100.0, 101.0, 50),
            ],
        );
        let new = run(
            "6.12",
            &[
                ("a", 119.0, 120.0, 50),
                ("b", 79.0, 80.0, 50),
                ("c", 140.0, 150.0, 50),
                ("d", 104.0, 105.0, 50),
            ],
        );
        let due = [
            ("a", Verdict::Same),
            ("b", Verdict::Better),
            ("c", Verdict::Worse),
            ("d", Verdict::Same),
        ];
        assert_eq!(
            verdicts(&old, &new),
            due.map(|(case, verdict)| (case.to_owned(), verdict))
        );
        let b = &compare(&old, &new)[1];
        assert!(
            (b.change_percent.unwrap() + 21.0).abs() < 1e-9
                && (b.noise.unwrap() - 20.0).abs() < 1e-9
        );
    }

    #[test]
    fn a_case_of_one_run_alone_is_told_and_two_values_judge_nothing() {
        let old = run("6.12", &[("a", 100.0, 100.0, 2), ("gone", 1.0, 1.0, 9)]);
        let new = run("6.12", &[("a", 900.0, 900.0, 2), ("new", 1.0, 1.0, 9)]);
        let due = [
            ("a", Verdict::TooFew),
            ("gone", Verdict::OnlyOld),
            ("new", Verdict::OnlyNew),
        ];
        assert_eq!(
            verdicts(&old, &new),
            due.map(|(case, verdict)| (case.to_owned(), verdict))
        );
    }

    #[test]
    fn other_hosts_and_partial_runs_raise_doubts() {
        let (old, mut new) = (run("6.1", &[]), run("6.12", &[]));
        new.partial = true;
        let doubts = old.doubts(&new);
        assert_eq!(doubts.len(), 2, "{doubts:?}");
        assert!(
            doubts[0].contains("kernel was \"6.1\" and is \"6.12\""),
            "{doubts:?}"
        );
        assert!(old.doubts(&old).is_empty());
    }

    #[test]
    fn what_is_no_report_is_refused() {
        for text in [
            "",
            "{}",
            "[1]",
            r#"{"forkvm":"0.1.0","host":{},"partial":false}"#,
        ] {
            assert!(Past::parse(text).is_err(), "{text}");
        }
    }
}
