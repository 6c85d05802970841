//! Rows as CSV: a line each, with every column that any of them has.

use serde_json::Value;
use thiserror::Error;

use super::report::Row;

/// Columns that come first, in this order; the others follow by name.
const FIRST: [&str; 10] = [
    "scenario", "case", "unit", "p50", "p90", "p99", "min", "max", "n", "outliers",
];

/// Rows could not be written as CSV.
#[derive(Debug, Error)]
#[error("writing the rows as CSV failed: {0}")]
pub struct CsvError(String);

/// `rows` as CSV (RFC 4180) with a line of names. A column that a row does not have is empty.
pub fn csv(rows: &[Row]) -> Result<String, CsvError> {
    let failed = |error: &dyn std::error::Error| CsvError(error.to_string());
    let rows: Vec<Value> = rows
        .iter()
        .map(|row| serde_json::to_value(row).map_err(|error| failed(&error)))
        .collect::<Result<_, _>>()?;
    let mut columns: Vec<&str> = FIRST.to_vec();
    let names = rows
        .iter()
        .filter_map(Value::as_object)
        .flat_map(|row| row.keys());
    let mut others: Vec<&str> = names
        .map(String::as_str)
        .filter(|name| !FIRST.contains(name))
        .collect();
    others.sort_unstable();
    others.dedup();
    columns.extend(others);
    let mut writer = csv::Writer::from_writer(Vec::new());
    writer
        .write_record(&columns)
        .map_err(|error| failed(&error))?;
    for row in &rows {
        let cell = |name: &&str| match row.get(name) {
            None | Some(Value::Null) => String::new(),
            Some(Value::String(text)) => text.clone(),
            Some(value) => value.to_string(),
        };
        writer
            .write_record(columns.iter().map(cell))
            .map_err(|error| failed(&error))?;
    }
    let bytes = writer.into_inner().map_err(|error| failed(&error))?;
    String::from_utf8(bytes).map_err(|error| failed(&error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::measure::{Samples, Unit};
    use crate::bench::report::rows;
    use crate::host::Host;

    #[test]
    fn every_row_has_every_column_and_says_what_it_was_measured_on() {
        let mut samples = Samples::default();
        samples.value("a", Unit::Us, 4.0).column("pages", 16.0);
        samples.value("b", Unit::Mib, 1.5);
        let host = Host {
            cpu_model: "Some, \"CPU\"".into(),
            ..Host::here()
        };
        let text = csv(&rows("s", &samples, &host)).unwrap();
        let mut reader = csv::Reader::from_reader(text.as_bytes());
        let names = reader.headers().unwrap().clone();
        assert_eq!(names.iter().take(FIRST.len()).collect::<Vec<_>>(), FIRST);
        let records: Vec<_> = reader.records().map(Result::unwrap).collect();
        let at = |record: usize, name: &str| {
            let column = names.iter().position(|one| one == name).unwrap();
            records[record][column].to_owned()
        };
        assert_eq!(
            (at(0, "pages"), at(1, "pages")),
            ("16.0".into(), String::new())
        );
        assert_eq!((at(0, "unit"), at(1, "unit")), ("us".into(), "MiB".into()));
        for (name, due) in [
            ("host_cpu", "Some, \"CPU\""),
            ("kvm", host.kvm),
            ("kernel", &host.kernel),
        ] {
            assert_eq!(at(1, name), due, "{name}");
        }
        assert!(!at(0, "load1").is_empty() && !at(0, "forkvm").is_empty());
    }
}
