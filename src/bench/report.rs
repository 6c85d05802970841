//! What a run of the laboratory found: the object of the contract, row by row.

use std::collections::BTreeMap;

use serde::Serialize;

use super::measure::{Case, Samples, Unit};
use super::outliers::{self, Outliers, median};
use crate::host::Host;
use crate::percentiles::Percentiles;

/// The whole. The version of forkvm is put in by who writes it.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Where it ran, as it was in the beginning.
    pub host: Host,
    /// The scenario, or `all`.
    pub scenario: String,
    /// What the order of the repetitions follows from.
    pub seed: u64,
    /// How much was measured.
    pub quick: bool,
    /// Whether it was stopped, or a part of it failed, before all was measured.
    pub partial: bool,
    /// What was measured.
    pub rows: Vec<Row>,
    /// What this host cannot do.
    pub skipped: Vec<LeftOut>,
    /// What went wrong.
    pub failed: Vec<LeftOut>,
}

/// An experiment without all of its figures.
#[derive(Clone, Debug, Serialize)]
pub struct LeftOut {
    /// Its scenario.
    pub scenario: &'static str,
    /// How the names of its cases begin.
    pub case: String,
    /// The reason, for people.
    pub why: String,
}

/// One case.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Its scenario.
    pub scenario: &'static str,
    /// Its name.
    pub case: String,
    /// In what the percentiles are.
    pub unit: Unit,
    /// Of all values, outliers included.
    #[serde(flatten)]
    pub percentiles: Percentiles,
    /// How many of the values stand out ([`outliers`]).
    pub outliers: usize,
    /// Columns of the scenario: the median of what was told.
    #[serde(flatten)]
    pub columns: BTreeMap<&'static str, f64>,
    /// Versions of what else was at work.
    #[serde(flatten)]
    pub versions: BTreeMap<&'static str, String>,
    /// Under what circumstances.
    #[serde(flatten)]
    pub on: Circumstances,
    /// The values themselves, in the order in which they were measured.
    #[serde(skip)]
    pub values: Vec<f64>,
    /// Whether the first of them stands out as too slow.
    #[serde(skip)]
    pub first_is_slow: bool,
}

/// What a row was measured on, so that one row alone can be quoted.
#[derive(Clone, Debug, Serialize)]
pub struct Circumstances {
    /// Version of forkvm.
    pub forkvm: &'static str,
    /// KVM flavour.
    pub kvm: &'static str,
    /// Release of the host's kernel.
    pub kernel: String,
    /// Name of the host's CPU.
    pub host_cpu: String,
    /// CPUs that could be used.
    pub host_cpus: usize,
    /// RAM of the host.
    pub host_memory_mib: u64,
    /// Load average over one minute at the repetitions of this row: their median.
    pub load1: f64,
}

/// What people are shown of the rows of a scenario: what all have in common is said once, and phases
/// are a table of their own.
#[derive(Debug)]
pub struct Digest<'a> {
    /// Columns that every row has, with the same value.
    pub common: Vec<(&'static str, f64)>,
    /// The rows that are no phase.
    pub rows: Vec<&'a Row>,
    /// Names of the phases, in their order.
    pub phases: Vec<&'a str>,
    /// What is made of phases, and the median of each.
    pub by_phase: Vec<(&'a str, Vec<Option<f64>>)>,
}

/// What stands between the name of a case and that of a phase of it.
pub const PHASE: &str = "/phase/";

impl<'a> Digest<'a> {
    /// Of `rows`, which are of one scenario.
    pub fn of(rows: impl Iterator<Item = &'a Row> + Clone) -> Digest<'a> {
        let mut phases: Vec<&str> = Vec::new();
        let mut ways: Vec<&str> = Vec::new();
        let of_phases = rows
            .clone()
            .filter_map(|row| Some((row, row.case.split_once(PHASE)?)));
        for (_, (way, phase)) in of_phases.clone() {
            if !phases.contains(&phase) {
                phases.push(phase);
            }
            if !ways.contains(&way) {
                ways.push(way);
            }
        }
        let median = |way: &str, phase: &str| {
            let mut found = of_phases.clone().filter(|(_, name)| *name == (way, phase));
            found.next().map(|(row, _)| row.percentiles.p50)
        };
        let by_phase = ways
            .iter()
            .map(|way| {
                (
                    *way,
                    phases.iter().map(|phase| median(way, phase)).collect(),
                )
            })
            .collect();
        let rows: Vec<&Row> = rows.filter(|row| !row.case.contains(PHASE)).collect();
        let common = rows.first().map_or_else(Vec::new, |first| {
            let everywhere = |(name, value): &(&&'static str, &f64)| {
                rows.iter()
                    .all(|row| row.columns.get(*name) == Some(*value))
            };
            let found = first.columns.iter().filter(everywhere);
            found.map(|(name, value)| (*name, *value)).collect()
        });
        Digest {
            common,
            rows,
            phases,
            by_phase,
        }
    }

    /// The columns of `row` that are not common to all.
    pub fn own(&self, row: &Row) -> Vec<(&'static str, f64)> {
        let is_common = |name: &str| self.common.iter().any(|(common, _)| *common == name);
        let own = row.columns.iter().filter(|(name, _)| !is_common(name));
        own.map(|(name, value)| (*name, *value)).collect()
    }

    /// Versions of what was at work beside forkvm in any of the rows.
    pub fn versions(&self) -> BTreeMap<&'static str, &'a str> {
        let all = self.rows.iter().flat_map(|row| &row.versions);
        all.map(|(of, version)| (*of, version.as_str())).collect()
    }

    /// How many rows have values that stand out, and the one with most of them.
    pub fn outliers(&self) -> Option<(usize, &'a Row)> {
        let share = |row: &Row| row.outliers as f64 / row.percentiles.n as f64;
        let with = || self.rows.iter().copied().filter(|row| row.outliers > 0);
        let most = with().max_by(|one, other| share(one).total_cmp(&share(other)))?;
        Some((with().count(), most))
    }
}

/// Name under which the runner notes the load beside each value.
pub(super) const LOAD: &str = "load1";

impl Row {
    /// The number of outliers, for people: a dash where there are too few values to tell.
    pub fn outliers_if_known(&self) -> String {
        if self.percentiles.n < outliers::FEWEST as u64 {
            return "-".to_owned();
        }
        self.outliers.to_string()
    }
}

impl Circumstances {
    fn on(host: &Host, load1: f64) -> Circumstances {
        Circumstances {
            forkvm: env!("CARGO_PKG_VERSION"),
            kvm: host.kvm,
            kernel: host.kernel.clone(),
            host_cpu: host.cpu_model.clone(),
            host_cpus: host.cpus,
            host_memory_mib: host.memory_mib,
            load1,
        }
    }
}

/// The rows of what an experiment gave.
pub(super) fn rows(scenario: &'static str, samples: &Samples, host: &Host) -> Vec<Row> {
    let row = |case: &Case| {
        let percentiles = Percentiles::of_values(&case.values, case.unit.least())?;
        let Outliers {
            count,
            first_is_slow,
        } = outliers::find(&case.values);
        let mut columns: BTreeMap<_, _> = case
            .columns
            .iter()
            .map(|(name, values)| (*name, median(values)))
            .collect();
        let load1 = columns.remove(LOAD).unwrap_or(host.load1);
        Some(Row {
            scenario,
            case: case.name.clone(),
            unit: case.unit,
            percentiles,
            outliers: count,
            columns,
            versions: case.versions.clone(),
            on: Circumstances::on(host, load1),
            values: case.values.clone(),
            first_is_slow,
        })
    };
    samples.cases().iter().filter_map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::measure::Version;

    #[test]
    fn a_row_says_by_itself_what_it_was_measured_on() {
        let mut samples = Samples::default();
        samples.value("a/b", Unit::Us, 4.0).column("pages", 16.0);
        let qemu = Version {
            of: "qemu",
            text: "7.2.22 (Debian)".into(),
        };
        let case = samples.value("a/b", Unit::Us, 6.0);
        case.column(LOAD, 0.25).version(&qemu);
        let host = Host::here();
        let rows = rows("fault", &samples, &host);
        let row = serde_json::to_value(&rows[0]).unwrap();
        assert_eq!(row["scenario"], "fault");
        assert_eq!(row["case"], "a/b");
        assert_eq!(row["unit"], "us");
        assert_eq!(row["n"], 2);
        assert_eq!(row["pages"], 16.0);
        assert_eq!(row["load1"], 0.25);
        assert_eq!(row["kernel"], host.kernel.as_str());
        assert_eq!(row["kvm"], host.kvm);
        assert_eq!(row["qemu"], "7.2.22 (Debian)");
        assert_eq!(row["forkvm"], env!("CARGO_PKG_VERSION"));
    }

    #[test]
    fn a_digest_says_once_what_is_common_and_puts_phases_apart() {
        let mut samples = Samples::default();
        for (case, dirty) in [("a/built", 1.0), ("b/built", 4.0)] {
            samples
                .value(case, Unit::Us, 5.0)
                .column("mib", 64.0)
                .column("dirty", dirty);
        }
        for (case, took) in [
            ("a/phase/pause", 2.0),
            ("a/phase/save", 3.0),
            ("b/phase/save", 4.0),
        ] {
            samples.value(case, Unit::Us, took);
        }
        let rows = rows("fork", &samples, &Host::here());
        let digest = Digest::of(rows.iter());
        assert_eq!(digest.common, [("mib", 64.0)]);
        assert_eq!(digest.own(digest.rows[1]), [("dirty", 4.0)]);
        assert_eq!(digest.rows.len(), 2);
        assert_eq!(digest.phases, ["pause", "save"]);
        let due = [
            ("a", vec![Some(2.0), Some(3.0)]),
            ("b", vec![None, Some(4.0)]),
        ];
        assert_eq!(digest.by_phase, due);
        assert!(digest.outliers().is_none());
    }
}
