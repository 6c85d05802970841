//! Rows for people.

use std::io::{self, Write};

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use forkvm::bench::Scenario;
use forkvm::bench::chart::short;
use forkvm::bench::report::{Digest, Report, Row};

/// Prints the rows of a scenario, how to read them, and what stands out.
pub(super) fn print(text: &mut dyn Write, scenario: &Scenario, rows: &[Row]) -> io::Result<()> {
    let Some(first) = rows.first() else {
        return Ok(());
    };
    writeln!(text, "\n{}: {}", scenario.name, scenario.about)?;
    writeln!(text, "{}", scenario.reading)?;
    let on = &first.on;
    writeln!(
        text,
        "On {}, {} CPUs, Linux {}, KVM {}, forkvm {}; load {}",
        on.host_cpu,
        on.host_cpus,
        on.kernel,
        on.kvm,
        on.forkvm,
        short(on.load1)
    )?;
    let digest = Digest::of(rows.iter());
    if !digest.common.is_empty() {
        writeln!(text, "In all rows: {}", named(&digest.common))?;
    }
    for (of, version) in digest.versions() {
        writeln!(text, "Version of {of}: {version}")?;
    }
    writeln!(text, "{}", table(&digest))?;
    if !digest.by_phase.is_empty() {
        writeln!(text, "Phases, median in us:\n{}", phases(&digest))?;
    }
    if let Some((cases, most)) = digest.outliers() {
        outliers(text, cases, most)?;
    }
    Ok(())
}

fn named(columns: &[(&str, f64)]) -> String {
    let one = |(name, value): &(&str, f64)| format!("{name} {}", short(*value));
    columns.iter().map(one).collect::<Vec<_>>().join(", ")
}

fn table(digest: &Digest<'_>) -> Table {
    let mut table = Table::new();
    table
        .load_preset(presets::UTF8_FULL_CONDENSED)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header([
            "case", "unit", "p50", "p90", "p99", "min", "max", "n", "out", "with",
        ]);
    for row in &digest.rows {
        let found = &row.percentiles;
        let numbers = [found.p50, found.p90, found.p99, found.min, found.max].map(short);
        let head = [row.case.clone(), row.unit.as_str().to_owned()];
        let counts = [found.n.to_string(), row.outliers_if_known()];
        let with = named(&digest.own(row));
        table.add_row(head.into_iter().chain(numbers).chain(counts).chain([with]));
    }
    right_aligned(&mut table, 2..9);
    table
}

fn phases(digest: &Digest<'_>) -> Table {
    let mut table = Table::new();
    table
        .load_preset(presets::UTF8_FULL_CONDENSED)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header([""].iter().chain(&digest.phases));
    for (way, medians) in &digest.by_phase {
        let number = |median: &Option<f64>| median.map_or_else(|| "-".to_owned(), short);
        table.add_row(
            [(*way).to_owned()]
                .into_iter()
                .chain(medians.iter().map(number)),
        );
    }
    right_aligned(&mut table, 1..digest.phases.len() + 1);
    table
}

fn right_aligned(table: &mut Table, columns: std::ops::Range<usize>) {
    for column in columns {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
}

/// As hyperfine does: what was found, and what it may mean.
fn outliers(text: &mut dyn Write, cases: usize, most: &Row) -> io::Result<()> {
    let (case, count, n) = (&most.case, most.outliers, most.percentiles.n);
    let meaning = if most.first_is_slow {
        "its first is one of them: something was still cold after the warm-up"
    } else {
        "something else ran on the host: p99 and max tell of it, p50 hardly does"
    };
    writeln!(
        text,
        "Outliers in {cases} cases, most in {case} ({count} of {n}); {meaning}."
    )
}

/// Prints what this host cannot do, and what went wrong.
pub(super) fn print_left_out(text: &mut dyn Write, report: &Report) -> io::Result<()> {
    for one in &report.skipped {
        let (scenario, case) = (one.scenario, &one.case);
        writeln!(text, "{scenario} {case}: not measured: {}", one.why)?;
    }
    for one in &report.failed {
        writeln!(text, "FAILED: {} {}: {}", one.scenario, one.case, one.why)?;
    }
    if report.partial {
        writeln!(text, "partial: not everything was measured")?;
    }
    if report.rows.iter().any(|row| row.outliers > 0) {
        writeln!(
            text,
            "Outliers lie more than 10 standard deviations from the median, by the modified z-score \
             (median absolute deviation). They are counted, not dropped. With many of them, measure again \
             on a quiet host."
        )?;
    }
    Ok(())
}
