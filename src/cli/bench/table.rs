//! Rows for people.

use std::io::{self, Write};

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use forkvm::bench::Scenario;
use forkvm::bench::chart::short;
use forkvm::bench::report::{Report, Row};

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
    writeln!(text, "{}", table(rows))?;
    rows.iter()
        .filter(|row| row.outliers > 0)
        .try_for_each(|row| outliers(text, row))
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new();
    table
        .load_preset(presets::UTF8_FULL_CONDENSED)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header([
            "case", "unit", "p50", "p90", "p99", "min", "max", "n", "with",
        ]);
    for row in rows {
        let found = &row.percentiles;
        let numbers = [found.p50, found.p90, found.p99, found.min, found.max].map(short);
        let with: Vec<String> = row
            .columns
            .iter()
            .map(|(name, value)| format!("{name} {}", short(*value)))
            .collect();
        let head = [row.case.clone(), row.unit.as_str().to_owned()];
        let tail = [found.n.to_string(), with.join(", ")];
        table.add_row(head.into_iter().chain(numbers).chain(tail));
    }
    for column in 2..8 {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

/// As hyperfine does: what was found, and what it may mean.
fn outliers(text: &mut dyn Write, row: &Row) -> io::Result<()> {
    let (case, count, n) = (&row.case, row.outliers, row.percentiles.n);
    let meaning = if row.first_is_slow {
        "the first is one of them: something was still cold after the warm-up"
    } else {
        "something else ran on the host; p99 and max tell of it, p50 hardly does"
    };
    writeln!(
        text,
        "outliers: {case}: {count} of {n} values stand out; {meaning}"
    )
}

/// Prints what this host cannot do, and what went wrong.
pub(super) fn print_left_out(text: &mut dyn Write, report: &Report) -> io::Result<()> {
    for one in &report.skipped {
        writeln!(text, "skipped: {} {}: {}", one.scenario, one.case, one.why)?;
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
