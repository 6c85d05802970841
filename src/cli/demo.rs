//! `forkvm demo`: the main job on real input, judged.

use std::fs;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;

use anyhow::Context;
use clap::Args;
use comfy_table::{Table, presets::UTF8_FULL_CONDENSED};
use forkvm::demo::answers::{self, Answers};
use forkvm::demo::independent::Sample;
use forkvm::demo::input::{Input, InputSpec};
use forkvm::demo::report::Report;
use forkvm::demo::run::{self, RunSpec};
use forkvm::demo::simulate::Simulation;
use forkvm::engine::limits::MAX_CLONES;
use forkvm::host::Host;
use forkvm::percentiles::Percentiles;
use forkvm::vmm::memory::{MAX_MIB, MIN_MIB};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::console::Terminal;
use super::fork_options::ForkOptions;
use super::output::{Outcome, Output};
use super::progress::Spinner;

const EXAMPLES: &str = "\
Examples:
  forkvm demo                                    32 clones, forked by the guest itself
  forkvm demo --clones 4 --vcpus 2               each clone maps on two vCPUs
  forkvm demo --freeze copy --memory-mib 6144    the eager baseline; RAM beyond 4 GiB
  forkvm demo --forked-by host --clones 8        the host forks, by Vm::fork
  forkvm demo --spawner process                  clones in processes of their own
  forkvm demo --memory-mode lazy                 clones fetch what they touch from the parent
  forkvm demo --memory-mode lazy --freeze delta  a fork of a fork: from parent and grandparent

The genomes and lambda's reads come from the Debian packages bowtie-examples and bowtie2-examples.
In DIR: demo.json (the figures), demo.sam (the records), demo/ (disks and consoles).
With freeze delta the VM that built the index forks one clone, and that clone forks the others.";

/// Options of `demo`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Demo {
    /// Clones
    #[arg(long, value_name = "N", default_value_t = 32,
          value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_CLONES)))]
    clones: u32,
    /// vCPUs of the parent, and of each clone
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u32).range(1..=i64::from(forkvm::abi::MAX_VCPUS)))]
    vcpus: u32,
    /// RAM in MiB
    #[arg(long, value_name = "MIB", default_value_t = 512,
          value_parser = clap::value_parser!(u64).range(MIN_MIB..=MAX_MIB))]
    memory_mib: u64,
    /// Who asks for the fork
    #[arg(long, value_name = "WHO", default_value = "guest", value_parser = ["guest", "host"])]
    forked_by: String,
    /// Reads to draw from E. coli, beside lambda's own
    #[arg(long, value_name = "N", default_value_t = 100_000)]
    reads: usize,
    /// Pairs to take of lambda's own 10,000
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    lambda_pairs: usize,
    /// Reads to check by an independent algorithm
    #[arg(long, value_name = "N", default_value_t = 200)]
    checks: usize,
    /// Seed of the drawn reads and of the checks [default: from the clock]
    #[arg(long)]
    seed: Option<u64>,
    /// Where results go
    #[arg(long, value_name = "DIR", default_value = "target")]
    target: PathBuf,
    #[command(flatten)]
    forks: ForkOptions,
}

impl Demo {
    pub(crate) fn run(self, output: &Output) -> anyhow::Result<Outcome> {
        self.forks.check()?;
        let seed = self.seed.unwrap_or_else(seed_of_the_clock);
        let mut text = output.text();
        let folder = self.target.join("demo");
        fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
        let spec = InputSpec {
            simulation: Simulation {
                seed,
                count: self.reads,
            },
            lambda_pairs: self.lambda_pairs,
        };
        let input = {
            let _spinner = Spinner::new("drawing reads and writing disks");
            Input::prepare(&folder, &spec)?
        };
        writeln!(text, "{} reads to map; seed {seed}", input.reads)?;
        let log = folder.join("consoles.log");
        let log = fs::File::create(&log).with_context(|| format!("creating {}", log.display()))?;
        let spec = RunSpec {
            memory_mib: self.memory_mib,
            vcpus: self.vcpus,
            clones: self.clones,
            family: self.forks.family()?,
            forked_by_host: self.forked_by == "host",
            consoles: Arc::new(Terminal::new(Box::new(log), None)),
        };
        let run = {
            let _spinner = Spinner::new("guests at work");
            run::run(&input, &spec)
                .with_context(|| format!("consoles are in {}", folder.display()))?
        };
        let sample = Sample {
            count: self.checks,
            seed,
        };
        let threads = thread::available_parallelism().map_or(1, usize::from);
        let sam = self.target.join("demo.sam");
        let answers = answers::judge(&input, &run.shares, sample, threads, &sam, bar)?;
        let failures = [answers.failures.clone(), run.failures.clone()].concat();
        let report = Report::new(Host::here(), &input, seed, &run, answers);
        let json = serde_json::to_value(&report)?;
        let file = self.target.join("demo.json");
        fs::write(&file, serde_json::to_string_pretty(&json)? + "\n")
            .with_context(|| format!("writing {}", file.display()))?;
        writeln!(text, "{}", table(&report))?;
        writeln!(
            text,
            "records: {}, figures: {}",
            sam.display(),
            file.display()
        )?;
        failures
            .iter()
            .try_for_each(|failure| writeln!(text, "WRONG: {failure}"))?;
        Ok(Outcome {
            status: u8::from(!failures.is_empty()),
            report: json,
        })
    }
}

fn seed_of_the_clock() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(1, |since| since.as_secs())
}

/// For people: the figures of a run.
fn table(report: &Report<Host>) -> Table {
    let mut table = Table::new();
    table.load_preset(UTF8_FULL_CONDENSED);
    let ms = |us: f64| format!("{:.2} ms", us / 1000.0);
    let p50_p99 = |times: &Option<Percentiles>| {
        let text = |p: &Percentiles| format!("{} / {}", ms(p.p50), ms(p.p99));
        times.as_ref().map_or_else(|| "-".to_owned(), text)
    };
    let host = &report.host;
    let Report {
        clones,
        vcpus,
        memory_mib,
        freeze,
        memory_mode,
        depth,
        forked_by,
        spawner,
        answers,
        ..
    } = report;
    let mut row = |name: &str, value: String| {
        table.add_row([name, &value]);
    };
    row(
        "host",
        format!(
            "{}, {} CPUs, KVM {}, load {}",
            host.kernel, host.cpus, host.kvm, host.load1
        ),
    );
    row(
        "fork",
        format!(
            "{clones} clones by the {forked_by}, freeze {freeze}, memory {memory_mode}, depth {depth}, \
             spawner {spawner}"
        ),
    );
    row(
        "each VM",
        format!(
            "{memory_mib} MiB, {vcpus} vCPUs, {:.1} MiB populated",
            report.populated_mib
        ),
    );
    row(
        "index built, once",
        ms(report.input.index_build_ms.unwrap_or_default() * 1000.0),
    );
    row(
        "parent stood still",
        report
            .parent_pause_us
            .map_or_else(|| "for good".to_owned(), ms),
    );
    row(
        "all clones running",
        report.all_running_us.map_or_else(|| "-".to_owned(), ms),
    );
    row(
        "first action, p50 / p99",
        p50_p99(&report.end_points_us.first_action),
    );
    row(
        "first answer, p50 / p99",
        p50_p99(&report.end_points_us.first_answer),
    );
    row(
        "pages fetched by the clones",
        format!("{}", report.pages_fetched),
    );
    row(
        "serving a fetch, p50 / p99",
        report.fetch_us.as_ref().map_or_else(
            || "-".to_owned(),
            |took| format!("{:.0} µs / {:.0} µs", took.p50, took.p99),
        ),
    );
    row(
        "private per clone, at most",
        format!("{} KiB", report.private_kib_per_clone),
    );
    row("state per clone", format!("{} bytes", report.state_bytes));
    row("records", records(answers));
    table
}

fn records(answers: &Answers) -> String {
    let verdict = if answers.answers_match {
        "all as on the host"
    } else {
        "WRONG"
    };
    let placed = answers.simulated_placed_percent.unwrap_or_default();
    let (records, checks) = (answers.records, answers.independent_checks);
    format!("{records}, {verdict}; {checks} checked by Myers; {placed:.2} % where they were drawn")
}

fn bar(len: u64, what: &'static str) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{msg} {wide_bar} {percent} % {eta}");
    ProgressBar::with_draw_target(Some(len), ProgressDrawTarget::stderr())
        .with_message(what)
        .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}
