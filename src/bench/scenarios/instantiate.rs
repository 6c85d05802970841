//! From the request on an existing fork point until one clone has passed each end point.

use std::sync::Arc;
use std::time::Duration;

use forkvm_clone_engine::{ForkPoint, FreezeKind, MemoryMode, WorkingSetPolicy};

use crate::bench::chart::{self, Chart};
use crate::bench::linux::LinuxSubject;
use crate::bench::measure::{BenchError, Experiment, Repetitions, Samples, Unit};
use crate::bench::report::Row;
use crate::bench::setting::{PLACES, POOLS, Pool, Setting};
use crate::bench::subject::{END_POINTS, Subject, SubjectSpec, end, end_points, passed, spawn_one};
use crate::bench::{Scale, Scenario};

/// See the module's text.
pub(super) const SCENARIO: Scenario = Scenario {
    name: "instantiate",
    about: "one clone of an existing fork point, to each of the five end points",
    reading: "Clock instantiate: from the spawn request on a fork point that exists, which the guest's own fork call made. 512 MiB of \
              RAM, 64 MiB populated, 1 vCPU; the answer comes after 16 pages were read and checked. linux: a machine of 64 MiB, whose \
              answer is its agent's: it has become itself.",
    experiments,
    charts,
};

/// How the clone's memory stands when it is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Memory {
    /// A whole image.
    Cow,
    /// An image that holds nothing yet but what the saved vCPU names.
    Lazy,
    /// An incomplete image that an earlier clone has already brought the same pages into.
    Sibling,
    /// As `Lazy`, but what a clone of the fork point before touched is brought while this one is made.
    Replayed,
}

impl Memory {
    const ALL: [Memory; 4] = [Memory::Cow, Memory::Lazy, Memory::Sibling, Memory::Replayed];

    fn as_str(self) -> &'static str {
        match self {
            Memory::Cow => "cow",
            Memory::Lazy => "lazy",
            Memory::Sibling => "sibling",
            Memory::Replayed => "replayed",
        }
    }

    fn mode(self) -> MemoryMode {
        match self {
            Memory::Cow => MemoryMode::Cow,
            Memory::Lazy | Memory::Sibling | Memory::Replayed => MemoryMode::Lazy,
        }
    }

    fn freeze(self) -> FreezeKind {
        match self.mode() {
            MemoryMode::Cow => FreezeKind::Remap,
            MemoryMode::Lazy => FreezeKind::WriteProtect,
        }
    }

    fn working_set(self) -> WorkingSetPolicy {
        match self {
            Memory::Replayed => WorkingSetPolicy::RecordAndReplay,
            Memory::Cow | Memory::Lazy | Memory::Sibling => WorkingSetPolicy::Off,
        }
    }

    /// Whether all clones are of one fork point; otherwise each is the first of its own.
    fn keeps_point(self) -> bool {
        matches!(self, Memory::Cow | Memory::Sibling)
    }
}

fn experiments(scale: Scale) -> Vec<Box<dyn Experiment>> {
    let measured = scale.pick(200, 40, 3);
    let mut all: Vec<Box<dyn Experiment>> = Vec::new();
    for &pool in POOLS {
        for memory in Memory::ALL {
            for &place in PLACES {
                let setting = Setting { pool, place };
                all.push(Box::new(Instantiate {
                    setting,
                    memory,
                    measured,
                    subject: None,
                    point: None,
                }));
            }
        }
    }
    if scale == Scale::Full {
        all.extend(linux());
    }
    all
}

/// Not what is quick: where KVM is software its boot alone takes a minute.
fn linux() -> Vec<Box<dyn Experiment>> {
    let mut all: Vec<Box<dyn Experiment>> = Vec::new();
    for &pool in POOLS {
        for mode in [MemoryMode::Cow, MemoryMode::Lazy] {
            all.push(Box::new(Linux {
                pool,
                mode,
                point: None,
                subject: None,
            }));
        }
    }
    all
}

struct Instantiate {
    setting: Setting,
    memory: Memory,
    measured: u32,
    // Before the subject: its family ends with that.
    point: Option<Arc<ForkPoint>>,
    subject: Option<Subject>,
}

impl Experiment for Instantiate {
    fn name(&self) -> String {
        let Setting { pool, place } = self.setting;
        format!(
            "{}/{}/{}",
            pool.as_str(),
            self.memory.as_str(),
            place.as_str()
        )
    }

    fn repetitions(&self) -> Repetitions {
        Repetitions {
            warm_up: self.measured.min(5),
            measured: self.measured,
        }
    }

    fn prepare(&mut self) -> Result<(), BenchError> {
        let memory = self.memory;
        let subject = Subject::boot(&SubjectSpec {
            own_forks: (memory.freeze(), memory.mode()),
            setting: self.setting,
            working_set: memory.working_set(),
            ..SubjectSpec::USUAL
        })?;
        // The first clone touches what a sibling finds, and what is replayed.
        let (point, elder) = subject.own_fork()?;
        end(&[elder]);
        self.point = memory.keeps_point().then_some(point);
        self.subject = Some(subject);
        Ok(())
    }

    fn repeat(&mut self, samples: &mut Samples) -> Result<(), BenchError> {
        let Some(subject) = &self.subject else {
            return Ok(());
        };
        subject.get_ready(1)?;
        let (point, clone) = match &self.point {
            Some(point) => (point.clone(), spawn_one(point)?.0),
            // Cold, or replayed into, is only what the first clone of a fork finds.
            None => subject.own_fork()?,
        };
        let asked = passed(&clone, "spawn_requested", |seen| seen.spawn_requested)?;
        let name = self.name();
        note(samples, &name, &point, end_points(&clone, asked)?);
        end(&[clone]);
        Ok(())
    }
}

/// A Linux machine. Each lazy clone is the first of its fork point, since what is missing comes once.
struct Linux {
    pool: Pool,
    mode: MemoryMode,
    // Before the subject: its family ends with that.
    point: Option<Arc<ForkPoint>>,
    subject: Option<LinuxSubject>,
}

impl Experiment for Linux {
    fn name(&self) -> String {
        let place = Setting::PLAIN.place.as_str();
        format!(
            "linux/{}/{}/{place}",
            self.pool.as_str(),
            self.mode.as_str()
        )
    }

    fn repetitions(&self) -> Repetitions {
        Repetitions {
            warm_up: 1,
            measured: 10,
        }
    }

    fn prepare(&mut self) -> Result<(), BenchError> {
        let subject = LinuxSubject::restore(Setting {
            pool: self.pool,
            ..Setting::PLAIN
        })?;
        if self.mode == MemoryMode::Cow {
            self.point = Some(subject.point(self.mode)?);
        }
        self.subject = Some(subject);
        Ok(())
    }

    fn repeat(&mut self, samples: &mut Samples) -> Result<(), BenchError> {
        let Some(subject) = &self.subject else {
            return Ok(());
        };
        let point = match &self.point {
            Some(point) => point.clone(),
            None => subject.point(self.mode)?,
        };
        subject.get_ready()?;
        let clone = subject.spawn_one(&point)?;
        let name = self.name();
        note(samples, &name, &point, clone.end_points());
        end(&[clone.vm.member().clone()]);
        Ok(())
    }
}

/// Notes when a clone of `point` passed each end point, as cases of `name`.
fn note(
    samples: &mut Samples,
    name: &str,
    point: &ForkPoint,
    end_points: impl IntoIterator<Item = (&'static str, Duration)>,
) {
    for (end_point, took) in end_points {
        samples
            .time(&format!("{name}/{end_point}"), Unit::Us, took)
            .column("memory_mib", point.config().memory_mib as f64)
            .column("populated_mib", point.populated_mib());
    }
}

/// For each way one chart with a curve per end point.
fn charts(rows: &[Row]) -> Vec<Chart> {
    let mut ways: Vec<&str> = Vec::new();
    for row in rows {
        if let Some((way, _)) = row.case.rsplit_once('/')
            && !ways.contains(&way)
        {
            ways.push(way);
        }
    }
    let chart = |way: &&str| {
        let of_way = rows.iter().filter_map(|row| {
            let end_point = row.case.strip_prefix(way)?.strip_prefix('/')?;
            END_POINTS
                .contains(&end_point)
                .then(|| (end_point.to_owned(), row.values.as_slice()))
        });
        chart::distribution(
            &format!("instantiate-{}", way.replace('/', "-")),
            &format!("Instantiate one clone: {}", way.replace('/', ", ")),
            "time from the spawn request, us",
            of_way,
        )
    };
    ways.iter().map(chart).collect()
}
