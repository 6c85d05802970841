//! From the request on a running parent until one clone has passed each end point, and where the
//! time goes.

use std::time::{Duration, Instant};

use forkvm_clone_engine::{FreezeKind, MemoryMode};

use crate::bench::chart::{Chart, Marks, short};
use crate::bench::linux::LinuxSubject;
use crate::bench::measure::{BenchError, Experiment, Repetitions, Samples, Unit};
use crate::bench::outliers::median;
use crate::bench::parents::Parents;
use crate::bench::report::{Digest, PHASE, Row};
use crate::bench::setting::{POOLS, Pool, Setting};
use crate::bench::subject::{
    PAGES_PER_MIB, Subject, SubjectSpec, Traced, end, end_points, fork_by, wait_answer,
};
use crate::bench::{Scale, Scenario};

/// See the module's text.
pub(super) const SCENARIO: Scenario = Scenario {
    name: "fork",
    about: "one clone of a running parent, to each end point, with the parent's pause and every phase",
    reading: "Clock fork: from the request on the running parent. 512 MiB of RAM, 64 MiB populated, 1 vCPU. N-MiB-dirty: what the \
              parent has written since its memory became private. remap is the first fork of a VM, delta any later one. linux: a machine \
              of 64 MiB that idles, to its clone's agent's answer, with what auto chooses.",
    experiments,
    charts,
};

/// How the parent's memory is kept, and what there is to keep.
#[derive(Clone, Copy, Debug)]
struct Way {
    mode: MemoryMode,
    freeze: FreezeKind,
    dirty_mib: u32,
}

const WAYS: [Way; 7] = [
    Way::new(MemoryMode::Lazy, FreezeKind::Delta, 1),
    Way::new(MemoryMode::Lazy, FreezeKind::Delta, 4),
    Way::new(MemoryMode::Lazy, FreezeKind::Delta, 16),
    Way::new(MemoryMode::Cow, FreezeKind::Delta, 4),
    Way::new(MemoryMode::Lazy, FreezeKind::WriteProtect, 64),
    Way::new(MemoryMode::Cow, FreezeKind::Remap, 64),
    Way::new(MemoryMode::Cow, FreezeKind::Copy, 64),
];

impl Way {
    const fn new(mode: MemoryMode, freeze: FreezeKind, dirty_mib: u32) -> Way {
        Way {
            mode,
            freeze,
            dirty_mib,
        }
    }

    /// What is forked, with clones from `pool`.
    fn parents(self, pool: Pool) -> Parents {
        let spec = SubjectSpec {
            dirty_pages: self.dirty_mib * PAGES_PER_MIB,
            setting: Setting {
                pool,
                ..Setting::PLAIN
            },
            ..SubjectSpec::USUAL
        };
        Parents::new(self.freeze, spec)
    }
}

fn experiments(scale: Scale) -> Vec<Box<dyn Experiment>> {
    let mut all: Vec<Box<dyn Experiment>> = Vec::new();
    for &pool in POOLS {
        for way in WAYS {
            let measured = match way.freeze {
                FreezeKind::Remap => scale.pick(8, 2, 1),
                FreezeKind::Delta => scale.pick(30, 8, 2),
                _ => scale.pick(10, 3, 1),
            };
            all.push(Box::new(Fork {
                pool,
                way,
                measured,
                parents: way.parents(pool),
            }));
        }
    }
    if scale == Scale::Full {
        // Not what is quick: where KVM is software its boot alone takes a minute.
        for mode in [MemoryMode::Cow, MemoryMode::Lazy] {
            all.push(Box::new(Linux {
                mode,
                subject: None,
            }));
        }
    }
    all
}

struct Fork {
    pool: Pool,
    way: Way,
    measured: u32,
    parents: Parents,
}

impl Experiment for Fork {
    fn name(&self) -> String {
        let Way {
            mode,
            freeze,
            dirty_mib,
        } = self.way;
        let pool = self.pool.as_str();
        format!("{pool}/{}/{freeze}/{dirty_mib}-MiB-dirty", mode.as_str())
    }

    fn repetitions(&self) -> Repetitions {
        Repetitions {
            warm_up: if self.parents.are_fresh() {
                1
            } else {
                3.min(self.measured)
            },
            measured: self.measured,
        }
    }

    fn prepare(&mut self) -> Result<(), BenchError> {
        self.parents.prepare()
    }

    fn repeat(&mut self, samples: &mut Samples) -> Result<(), BenchError> {
        let (name, way) = (self.name(), self.way);
        self.parents
            .with_next(|parent| fork(parent, way, &name, samples))
    }
}

/// A Linux machine that idles.
struct Linux {
    mode: MemoryMode,
    subject: Option<LinuxSubject>,
}

impl Experiment for Linux {
    fn name(&self) -> String {
        format!("linux/unpooled/{}/auto", self.mode.as_str())
    }

    fn repetitions(&self) -> Repetitions {
        Repetitions {
            warm_up: 1,
            measured: 10,
        }
    }

    fn prepare(&mut self) -> Result<(), BenchError> {
        self.subject = Some(LinuxSubject::restore(Setting::PLAIN)?);
        Ok(())
    }

    fn repeat(&mut self, samples: &mut Samples) -> Result<(), BenchError> {
        let Some(subject) = &self.subject else {
            return Ok(());
        };
        let name = self.name();
        let (clone, point, traced) = subject.fork(self.mode)?;
        let populated = point.populated_mib();
        let mut note = |case: &str, took| {
            samples
                .time(&format!("{name}/{case}"), Unit::Us, took)
                .column("populated_mib", populated);
        };
        for (end_point, took) in clone.end_points() {
            note(end_point, took);
        }
        note_traced(traced, note);
        end(&[clone.vm.member().clone()]);
        Ok(())
    }
}

/// Forks `parent` into one clone and notes what that took, as cases of `name`.
fn fork(parent: &Subject, way: Way, name: &str, samples: &mut Samples) -> Result<(), BenchError> {
    let asked = Instant::now();
    let ticket = parent.member().fork(fork_by(way.freeze, way.mode, 1))?;
    wait_answer(&ticket.clones[0], 1)?;
    let traced = parent.trace();
    let populated = ticket.point.populated_mib();
    let mut note = |case: &str, took| {
        samples
            .time(&format!("{name}/{case}"), Unit::Us, took)
            .column("populated_mib", populated)
            .column("dirty_mib", f64::from(way.dirty_mib));
    };
    for (end_point, took) in end_points(&ticket.clones[0], asked)? {
        note(end_point, took);
    }
    note_traced(traced, note);
    end(&ticket.clones);
    Ok(())
}

/// Notes the parent's pause and every phase.
fn note_traced(traced: Traced, mut note: impl FnMut(&str, Duration)) {
    for pause in traced.pauses {
        note("parent_pause", pause);
    }
    for (phase, took) in traced.phases {
        note(&format!("{}{phase}", &PHASE[1..]), took);
    }
}

/// Bars that are more times longer than the one in the middle are not drawn: nothing would be seen of
/// the others.
const TOO_LONG: f64 = 4.0;

/// Where the time of each way goes.
fn charts(rows: &[Row]) -> Vec<Chart> {
    let digest = Digest::of(rows.iter());
    let bar = |(way, medians): &(&str, Vec<Option<f64>>)| {
        let parts = medians.iter().map(|median| median.unwrap_or(0.0) / 1000.0);
        ((*way).to_owned(), parts.collect::<Vec<f64>>())
    };
    let mut bars: Vec<_> = digest.by_phase.iter().map(bar).collect();
    let sum = |(_, parts): &(String, Vec<f64>)| parts.iter().sum::<f64>();
    let longest = TOO_LONG * median(&bars.iter().map(sum).collect::<Vec<_>>());
    let (drawn, left_out): (Vec<_>, Vec<_>) = bars.drain(..).partition(|bar| sum(bar) <= longest);
    if drawn.is_empty() {
        return Vec::new();
    }
    let left_out = match left_out.len() {
        0 => String::new(),
        count => format!("; {count} of more than {} ms are not drawn", short(longest)),
    };
    vec![Chart {
        name: "fork-phases".into(),
        title: "Where the time of a fork into one clone goes".into(),
        x: format!("median time of each phase, ms{left_out}"),
        y: String::new(),
        log: (false, false),
        marks: Marks::Stacked {
            parts: digest
                .phases
                .iter()
                .map(|phase| (*phase).to_owned())
                .collect(),
            bars: drawn,
        },
    }]
}
