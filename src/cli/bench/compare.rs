//! `forkvm bench compare`: what changed beyond noise.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use forkvm::bench::chart::short;
use forkvm::bench::compare::{self, Compared, FEWEST, LEAST_CHANGE, Past, Verdict};
use serde_json::json;

use crate::cli::output::{Outcome, Output};

const EXAMPLES: &str = "\
Examples:
  forkvm bench fork --json old.json; ...; forkvm bench fork --json new.json
  forkvm bench compare old.json new.json
  forkvm bench compare old.json new.json --json - | jq '.rows[] | select(.verdict == \"worse\")'

A case has changed when its medians are further apart than the wider of the two spreads from p50 to
p90, and than 5 %: the typical value of one run would have been unusual in the other. What differs
between two runs on one host is not less random for more repetitions, so n does not narrow this.
A case with fewer than 3 values in either run is not judged. Always ends with 0 when both can be read.";

/// Options of `bench compare`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Compare {
    /// What an earlier run wrote with --json
    old: PathBuf,
    /// What a later run wrote
    new: PathBuf,
    /// List the cases that did not change as well
    #[arg(long)]
    all: bool,
}

impl Compare {
    pub(super) fn run(&self, output: &Output) -> anyhow::Result<Outcome> {
        let (old, new) = (read(&self.old)?, read(&self.new)?);
        let rows = compare::compare(&old, &new);
        let doubts = old.doubts(&new);
        let mut text = output.text();
        doubts
            .iter()
            .try_for_each(|doubt| writeln!(text, "doubtful: {doubt}"))?;
        let of_interest = |row: &&Compared| self.all || row.verdict != Verdict::Same;
        let shown: Vec<&Compared> = rows.iter().filter(of_interest).collect();
        if !shown.is_empty() {
            writeln!(text, "{}", table(&shown))?;
        }
        let count = |verdict: Verdict| rows.iter().filter(|row| row.verdict == verdict).count();
        let all = [
            Verdict::Better,
            Verdict::Worse,
            Verdict::Same,
            Verdict::TooFew,
            Verdict::OnlyNew,
            Verdict::OnlyOld,
        ];
        let counts: Vec<String> = all
            .iter()
            .map(|verdict| format!("{} {}", count(*verdict), verdict.as_str()))
            .collect();
        writeln!(text, "{} cases: {}", rows.len(), counts.join(", "))?;
        let criterion = json!({
            "medians_apart_by_more_than": "the wider p50..p90 spread",
            "least_change_percent": LEAST_CHANGE * 100.0,
            "fewest_values": FEWEST,
        });
        Ok(Outcome::done(json!({
            "old": self.old, "new": self.new, "doubts": doubts, "criterion": criterion, "rows": rows,
        })))
    }
}

fn read(path: &Path) -> anyhow::Result<Past> {
    let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    Past::parse(&text).with_context(|| format!("reading {}", path.display()))
}

fn table(rows: &[&Compared]) -> Table {
    let mut table = Table::new();
    table
        .load_preset(presets::UTF8_FULL_CONDENSED)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header([
            "scenario", "case", "unit", "old p50", "new p50", "change", "noise", "",
        ]);
    let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), short);
    for row in rows {
        let change = row
            .change_percent
            .map_or_else(|| "-".to_owned(), |percent| format!("{percent:+.1} %"));
        table.add_row([
            row.scenario.clone(),
            row.case.clone(),
            row.unit.clone(),
            number(row.old_p50),
            number(row.new_p50),
            change,
            number(row.noise),
            row.verdict.as_str().to_owned(),
        ]);
    }
    for column in 3..7 {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}
