//! What a job takes longer in forked clones than with a zero-cost fork, and a program in Linux than on the host.

mod linux;

use std::sync::Arc;
use std::time::{Duration, Instant};

use forkvm_abi::doorbell::report;
use forkvm_clone_engine::{FreezeKind, Member, MemoryMode};

use crate::bench::chart::Chart;
use crate::bench::measure::{BenchError, Experiment, Repetitions, Samples, Unit, told};
use crate::bench::report::Row;
use crate::bench::setting::{Pool, Setting};
use crate::bench::subject::{
    PAGES_PER_MIB, Subject, SubjectSpec, Work, end, fork_by, wait_answer, work,
};
use crate::bench::{Scale, Scenario};

/// See the module's text.
pub(super) const SCENARIO: Scenario = Scenario {
    name: "overhead",
    about: "a job in forked clones against VMs that were already running and waiting: a zero-cost fork; and a program in Linux against the same on the host",
    reading: "Percent that the job takes longer, from the fork's request until the last clone's answer, than from the word to VMs that wait with \
              everything in memory until the last of them answers; one after the other, again and again, as many VMs as CPUs; clones come from a pool filled before. The job \
              reads 16 MiB, computes, writes 4 MiB and takes about a second; guests count the pages themselves. \
              linux/cpu-bound: a loop of the shell of the guest's busybox in a clone, against the same busybox on the host, each by its own clock. \
              tick: what it takes longer, divided by the guest's timer interrupts: an upper bound.",
    experiments,
    charts: |_: &[Row]| -> Vec<Chart> { Vec::new() },
};

/// What the parent writes before it is forked: nothing, as it waits.
const DIRTY_MIB: u32 = 0;

/// Rounds by which the guest's speed is found.
const TRIAL_ROUNDS: u64 = 20_000_000;

fn experiments(scale: Scale) -> Vec<Box<dyn Experiment>> {
    let one = |mode| -> Box<dyn Experiment> {
        Box::new(Overhead {
            mode,
            measured: scale.pick(6, 1, 1),
            job: Duration::from_millis(scale.pick(1000, 1000, 200)),
            work: Work {
                read_pages: scale.pick(16, 16, 1) * PAGES_PER_MIB,
                write_pages: scale.pick(4, 4, 1) * PAGES_PER_MIB,
                rounds: TRIAL_ROUNDS,
                tell: true,
                ..Work::default()
            },
            waiting: Vec::new(),
            worked: 0,
            parent: None,
        })
    };
    let modes = scale.pick(
        &[MemoryMode::Cow, MemoryMode::Lazy][..],
        &[MemoryMode::Cow],
        &[MemoryMode::Cow],
    );
    let mut all: Vec<_> = modes.iter().map(|mode| one(*mode)).collect();
    if scale == Scale::Full {
        all.push(Box::<linux::CpuBound>::default());
    }
    all
}

struct Overhead {
    mode: MemoryMode,
    measured: u32,
    /// What the job is to take.
    job: Duration,
    work: Work,
    /// VMs that are there already.
    waiting: Vec<Subject>,
    /// How often they have worked.
    worked: usize,
    parent: Option<Subject>,
}

impl Overhead {
    fn boot(&self) -> Result<Subject, BenchError> {
        Subject::boot(&SubjectSpec {
            dirty_pages: DIRTY_MIB * PAGES_PER_MIB,
            work: self.work,
            setting: Setting {
                pool: Pool::Pooled,
                ..Setting::PLAIN
            },
            ..SubjectSpec::USUAL
        })
    }

    /// How long the waiting VMs take together.
    fn ideal(&mut self) -> Result<Duration, BenchError> {
        self.worked += 1;
        let asked = Instant::now();
        self.waiting.iter().try_for_each(|vm| work(vm.member()))?;
        last_answer(self.waiting.iter().map(Subject::member), self.worked, asked)
    }
}

/// From `asked` until the last of `vms` has answered for the `times`th time.
fn last_answer<'a>(
    vms: impl Iterator<Item = &'a Arc<Member>>,
    times: usize,
    asked: Instant,
) -> Result<Duration, BenchError> {
    let mut last = asked;
    for vm in vms {
        last = last.max(wait_answer(vm, times)?);
    }
    Ok(last.saturating_duration_since(asked))
}

impl Experiment for Overhead {
    fn name(&self) -> String {
        match self.mode {
            MemoryMode::Cow => "job-1s".into(),
            MemoryMode::Lazy => "job-1s/lazy".into(),
        }
    }

    fn repetitions(&self) -> Repetitions {
        Repetitions {
            warm_up: u32::from(self.measured > 1),
            measured: self.measured,
        }
    }

    fn prepare(&mut self) -> Result<(), BenchError> {
        let vms = std::thread::available_parallelism()
            .map_or(1, usize::from)
            .min(8);
        self.waiting = vec![self.boot()?];
        // The second time, when all it reads and writes is there.
        self.ideal()?;
        let trial = self.ideal()?.as_secs_f64();
        self.work.rounds = (TRIAL_ROUNDS as f64 * self.job.as_secs_f64() / trial) as u64;
        self.worked = 0;
        self.waiting = (0..vms).map(|_| self.boot()).collect::<Result<_, _>>()?;
        self.ideal()?;
        let parent = self.boot()?;
        // From then on it maps its memory privately, and is forked by delta.
        drop(parent.point(FreezeKind::Remap, MemoryMode::Cow)?);
        self.parent = Some(parent);
        Ok(())
    }

    fn repeat(&mut self, samples: &mut Samples) -> Result<(), BenchError> {
        let ideal = self.ideal()?;
        let Some(parent) = &self.parent else {
            return Ok(());
        };
        parent.get_ready(self.waiting.len() as u32)?;
        let asked = Instant::now();
        let spec = fork_by(FreezeKind::Delta, self.mode, self.waiting.len() as u32);
        let ticket = parent.member().fork(spec)?;
        let forked = last_answer(ticket.clones.iter(), 1, asked)?;
        let touched = touched(&ticket.clones[0]);
        end(&ticket.clones);
        let more = 100.0 * (forked.as_secs_f64() / ideal.as_secs_f64() - 1.0);
        let case = samples.value(&format!("{}/percent", self.name()), Unit::Percent, more);
        case.column("clones", ticket.clones.len() as f64)
            .column("populated_mib", ticket.point.populated_mib())
            .column("dirty_mib", f64::from(DIRTY_MIB))
            .column("zero_cost_ms", ideal.as_secs_f64() * 1e3)
            .column("forked_ms", forked.as_secs_f64() * 1e3);
        for (name, pages) in ["pages_read", "pages_written"].into_iter().zip(touched) {
            case.column(name, f64::from(pages));
        }
        Ok(())
    }
}

/// What a clone tells of the pages that it read and wrote.
fn touched(clone: &Member) -> Vec<u32> {
    let reports = clone.reports();
    let before_answer = reports
        .iter()
        .map(|(value, _)| *value)
        .take_while(|value| *value != report::ANSWER);
    before_answer.filter_map(told).collect()
}
