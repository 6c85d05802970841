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

/// Name under which the runner notes the load beside each value.
pub(super) const LOAD: &str = "load1";

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

    #[test]
    fn a_row_says_by_itself_what_it_was_measured_on() {
        let mut samples = Samples::default();
        samples.value("a/b", Unit::Us, 4.0).column("pages", 16.0);
        samples.value("a/b", Unit::Us, 6.0).column(LOAD, 0.25);
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
        assert_eq!(row["forkvm"], env!("CARGO_PKG_VERSION"));
    }
}
