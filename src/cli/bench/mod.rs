//! `forkvm bench`: the laboratory.
//!
//! Runs scenarios, prints their tables, and writes what was asked for. Ctrl-C ends a run after the
//! repetition that is under way; what was measured is written and marked partial. Each output is
//! written whole or not at all, and one that fails does not keep the others from being written.

mod compare;
mod progress;
mod table;

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::builder::{PossibleValue, PossibleValuesParser};
use clap::{Args, Subcommand};
use forkvm::bench::chart::{self, Chart};
use forkvm::bench::linux::Saved;
use forkvm::bench::report::Report;
use forkvm::bench::runner::Plan;
use forkvm::bench::{SCENARIOS, Scale, Scenario, export, page};
use forkvm::vmm::Kvm;

use super::errors;
use super::output::{Outcome, Output, write_whole};
use super::stop::Stop;
use progress::Bar;

const EXAMPLES: &str = "\
Examples:
  forkvm bench instantiate                       one clone of a fork point, to five end points
  forkvm bench fork --json fork.json             the same from a running parent, and every phase
  forkvm bench peers                             the same beside QEMU, fork+exec, and no engine
  forkvm bench fanout --csv fanout.csv           1 to 1000 clones
  forkvm bench pause --svg plots                 plots/*.svg: for a paper
  forkvm bench all --html bench.html             everything, as one page for a browser
  forkvm bench fault --quick                     seconds instead of minutes: to see roughly
  forkvm bench fork --seed 7                     repetitions in the order of another run
  forkvm bench compare old.json new.json         what changed beyond noise

Two clocks that are never mixed: `fork` counts from the request on a running parent, `instantiate` from
the request on a fork point that exists. Quote a figure with its end point, host, kernel and KVM
flavour; each row carries them. docs/benchmarks.md says how to cite and to repeat.
Ctrl-C: what was measured is written, marked partial. FORKVM_TEST_SCALE=small makes --quick smaller
still, for emulated hosts.";

/// Options of `bench`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES, args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct Bench {
    /// What to measure
    #[arg(required = true, value_parser = scenarios())]
    scenario: Option<String>,
    /// Write the rows to FILE as CSV
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Write a plot of each figure to DIR, as SVG
    #[arg(long, value_name = "DIR")]
    svg: Option<PathBuf>,
    /// Write a page with all tables and plots to FILE, readable by itself
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// What the order of the repetitions follows from [default: from the clock]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Few repetitions and small sizes: seconds a scenario
    #[arg(long)]
    quick: bool,
    #[command(subcommand)]
    command: Option<BenchCommand>,
}

#[derive(Debug, Subcommand)]
enum BenchCommand {
    /// Say what changed beyond noise between two runs
    Compare(compare::Compare),
}

/// Runs every scenario.
const ALL: &str = "all";

fn scenarios() -> PossibleValuesParser {
    let all = PossibleValue::new(ALL).help("every scenario, one after the other");
    let each = SCENARIOS
        .iter()
        .map(|one| PossibleValue::new(one.name).help(one.about));
    PossibleValuesParser::new(each.chain([all]))
}

impl Bench {
    pub(crate) fn run(self, output: &Output) -> anyhow::Result<Outcome> {
        if let Some(BenchCommand::Compare(command)) = &self.command {
            return command.run(output);
        }
        let name = self.scenario.clone().unwrap_or_else(|| ALL.to_owned());
        let chosen: Vec<&Scenario> = SCENARIOS
            .iter()
            .copied()
            .filter(|one| name == ALL || one.name == name)
            .collect();
        // Before anything is measured: what cannot run at all says so at once.
        drop(Kvm::open()?);
        let plan = Plan {
            seed: self.seed.unwrap_or_else(seed_of_the_clock),
            scale: self.scale(),
        };
        let stop = Stop::on_signals().context("hearing signals")?;
        let mut text = output.text();
        writeln!(text, "seed {}: `--seed {0}` repeats this order", plan.seed)?;
        let _linux = Saved::default();
        let mut report = Report::begin(&name, plan);
        let mut bar = Bar::new(stop.asked());
        for scenario in &chosen {
            if stop.exit_code().is_some() {
                report.partial = true;
                break;
            }
            let before = report.rows.len();
            report.run(scenario, plan, &mut bar);
            bar.clear();
            table::print(&mut text, scenario, &report.rows[before..])?;
        }
        table::print_left_out(&mut text, &report)?;
        let failures = self.export(&report, &chosen, &mut text)?;
        let failed = u8::from(failures > 0 || !report.failed.is_empty());
        let status = stop.exit_code().unwrap_or(failed);
        let report = serde_json::to_value(&report)?;
        Ok(Outcome { status, report })
    }

    fn scale(&self) -> Scale {
        let small = std::env::var_os("FORKVM_TEST_SCALE").is_some_and(|scale| scale == "small");
        match (self.quick, small) {
            (false, _) => Scale::Full,
            (true, false) => Scale::Quick,
            (true, true) => Scale::Small,
        }
    }

    /// Writes what was asked for; tells what cannot be written, and how much that is.
    fn export(
        &self,
        report: &Report,
        chosen: &[&Scenario],
        text: &mut dyn Write,
    ) -> anyhow::Result<usize> {
        let charts: Vec<Chart> = chosen
            .iter()
            .flat_map(|scenario| {
                let rows: Vec<_> = report
                    .rows
                    .iter()
                    .filter(|row| row.scenario == scenario.name)
                    .cloned()
                    .collect();
                if rows.is_empty() {
                    Vec::new()
                } else {
                    (scenario.charts)(&rows)
                }
            })
            .collect();
        let mut failures = 0;
        let mut written = |path: &Path, done: anyhow::Result<()>| -> anyhow::Result<()> {
            match done {
                Ok(()) => writeln!(text, "written: {}", path.display())?,
                Err(error) => {
                    failures += 1;
                    errors::report(&error);
                }
            }
            Ok(())
        };
        if let Some(path) = &self.csv {
            let done = export::csv(&report.rows)
                .map_err(anyhow::Error::from)
                .and_then(|csv| write_whole(path, csv.as_bytes()));
            written(path, done)?;
        }
        if let Some(dir) = &self.svg {
            for one in &charts {
                let path = dir.join(format!("{}.svg", one.name));
                let done = chart::svg(one)
                    .map_err(anyhow::Error::from)
                    .and_then(|svg| {
                        std::fs::create_dir_all(dir)
                            .with_context(|| format!("making the directory {}", dir.display()))?;
                        write_whole(&path, svg.as_bytes())
                    });
                written(&path, done)?;
            }
        }
        if let Some(path) = &self.html {
            let done = page::html(report, chosen, &charts)
                .map_err(anyhow::Error::from)
                .and_then(|page| write_whole(path, page.as_bytes()));
            written(path, done)?;
        }
        Ok(failures)
    }
}

fn seed_of_the_clock() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(1, |since| since.as_secs())
}
