//! `forkvm demo-linux`: a real program on real input, in clones of a Linux machine that was booted once.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use clap::Args;
use comfy_table::{Table, presets::UTF8_FULL_CONDENSED};
use forkvm::Payload;
use forkvm::demo_linux::disk;
use forkvm::demo_linux::input::{Input, InputError};
use forkvm::demo_linux::report::Report;
use forkvm::demo_linux::run::{self, Run, RunSpec, Watch};
use forkvm::engine::Family;
use forkvm::engine::limits::MAX_CLONES;
use forkvm::host::Host;
use forkvm::percentiles::Percentiles;
use forkvm::templates::Templates;
use forkvm::vmm::memory::{MAX_MIB, MIN_MIB};

use super::console::Terminal;
use super::errors::Usage;
use super::fork_options::ForkOptions;
use super::image::find_or_build;
use super::output::{Outcome, Output};
use super::progress::Spinner;
use super::stop::Stop;
use super::template::end_when_asked;

const EXAMPLES: &str = "\
Examples:
  forkvm demo-linux                              4 clones of a machine with 128 MiB
  forkvm demo-linux --clones 8 --memory-mode lazy
  forkvm demo-linux --spawner process            clones in processes of their own

ClustalW (clustalw) aligns 80 proteases (t-coffee-examples), a share of them in each clone, from an ext4 disk that mke2fs
(e2fsprogs) makes without root. The image `minimal` is built first if it is not in the cache, which takes minutes.
In DIR: demo-linux.json (the figures), demo-linux.aln (the alignments), demo-linux/ (disk, template, consoles).";

/// Options of `demo-linux`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct DemoLinux {
    /// Clones
    #[arg(long, value_name = "N", default_value_t = 4,
          value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_CLONES)))]
    clones: u32,
    /// vCPUs of the machine, and of each clone
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u32).range(1..=i64::from(forkvm::abi::MAX_VCPUS)))]
    vcpus: u32,
    /// RAM in MiB
    #[arg(long, value_name = "MIB", default_value_t = 128,
          value_parser = clap::value_parser!(u64).range(MIN_MIB..=MAX_MIB))]
    memory_mib: u64,
    /// Where results go
    #[arg(long, value_name = "DIR", default_value = "target")]
    target: PathBuf,
    #[command(flatten)]
    forks: ForkOptions,
}

impl DemoLinux {
    pub(crate) fn run(self, output: &Output) -> anyhow::Result<Outcome> {
        self.forks.check()?;
        let input = Input::load(self.clones).map_err(|error| match error {
            InputError::TooManyClones { .. } => Usage(error.to_string()).into(),
            error => anyhow::Error::from(error),
        })?;
        let mut text = output.text();
        let folder = self.target.join("demo-linux");
        fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
        let stop = Stop::on_signals().context("hearing signals")?;
        let image = match find_or_build("minimal", &stop, output) {
            Ok(built) => built.image,
            Err(error) => return stop.outcome(error),
        };
        let work = tempfile::tempdir().context("making a directory to work in")?;
        let expected = {
            let _spinner = Spinner::new("aligning on the host");
            input.align_here(work.path())?
        };
        let disk = folder.join("disk.img");
        let stage = tempfile::tempdir().context("making a directory to work in")?;
        disk::make(&input, stage.path(), &disk)?;
        let log = folder.join("consoles.log");
        let log = fs::File::create(&log).with_context(|| format!("creating {}", log.display()))?;
        let spec = RunSpec {
            payload: Payload::Kernel {
                kernel: image.vmlinux(),
                initrd: Some(image.initramfs()),
            },
            cmdline: image.cmdline().to_owned(),
            memory_mib: self.memory_mib,
            vcpus: self.vcpus,
            clones: self.clones,
            family: self.forks.family()?,
            disk,
            templates: Templates::at(folder.join("templates")),
            consoles: Arc::new(Terminal::new(Box::new(log), None)),
        };
        let ran = {
            let mut watch = Watching {
                spinner: Spinner::new("booting"),
                stop: &stop,
            };
            run::run(&spec, &mut watch)
        };
        let what = || format!("consoles are in {}", folder.display());
        let run = match ran.with_context(what) {
            Ok(run) => run,
            Err(error) => return stop.outcome(error),
        };
        self.tell(&mut text, image.kernel_version(), &input, &expected, &run)
    }

    fn tell(
        &self,
        text: &mut dyn Write,
        kernel: &str,
        input: &Input,
        expected: &[Vec<u8>],
        run: &Run,
    ) -> anyhow::Result<Outcome> {
        let report = Report::new(Host::here(), kernel, input, expected, run);
        let json = serde_json::to_value(&report)?;
        let merged: Vec<u8> = run
            .clones
            .iter()
            .flat_map(|clone| clone.answer.clone())
            .collect();
        let figures = serde_json::to_string_pretty(&json)? + "\n";
        let (alignments, file) = (
            self.target.join("demo-linux.aln"),
            self.target.join("demo-linux.json"),
        );
        for (path, content) in [(&alignments, &merged[..]), (&file, figures.as_bytes())] {
            fs::write(path, content).with_context(|| format!("writing {}", path.display()))?;
        }
        writeln!(text, "{}", table(&report))?;
        let (alignments, file) = (alignments.display(), file.display());
        writeln!(text, "alignments: {alignments}, figures: {file}")?;
        let outcome = Outcome {
            status: u8::from(!report.answers_match),
            report: json,
        };
        Ok(outcome)
    }
}

/// Shows what is under way, and ends the run when the user wants that.
struct Watching<'a> {
    spinner: Spinner,
    stop: &'a Stop,
}

impl Watch for Watching<'_> {
    fn at(&mut self, what: &'static str) {
        self.spinner.say(what);
    }

    fn begun(&mut self, family: &Arc<Family>) {
        if let Err(error) = end_when_asked(self.stop, family) {
            tracing::warn!(%error, "no thread to end the demo when it is asked to");
        }
    }
}

/// For people: the figures of a run.
fn table(report: &Report<Host>) -> Table {
    let mut table = Table::new();
    table.load_preset(UTF8_FULL_CONDENSED);
    let times = |times: &Option<Percentiles>, unit: &str| {
        let text = |p: &Percentiles| format!("{:.1} / {:.1} {unit}", p.p50, p.max);
        times.as_ref().map_or_else(|| "-".to_owned(), text)
    };
    let host = &report.host;
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
        "each VM",
        format!(
            "Linux {}, {} MiB, {} vCPUs",
            report.kernel, report.memory_mib, report.vcpus
        ),
    );
    row(
        "fork",
        format!(
            "{} clones, freeze {}, memory {}",
            report.clones, report.freeze, report.memory_mode
        ),
    );
    row(
        "booted, once",
        format!(
            "{} ms, a template after {} ms",
            report.boot_ms, report.template_ms
        ),
    );
    row(
        "clone to its agent's answer, p50 / max",
        times(&report.clone_to_answer_ms, "ms"),
    );
    for (phase, took) in &report.phases_us {
        row(&format!("  {phase}"), times(&Some(*took), "\u{b5}s"));
    }
    row(
        "the program in a clone, p50 / max",
        times(&report.program_ms, "ms"),
    );
    let verdict = if report.answers_match {
        "as on the host, byte by byte"
    } else {
        "WRONG: not as on the host"
    };
    row(
        "alignments",
        format!("of {} sequences, {verdict}", report.input.sequences),
    );
    table
}
