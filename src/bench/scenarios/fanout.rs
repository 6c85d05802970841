//! How long it takes until many clones of one fork point run.

use std::sync::Arc;
use std::time::{Duration, Instant};

use forkvm_clone_engine::spawn::SpawnError;
use forkvm_clone_engine::{
    ForkError, ForkPoint, FreezeKind, Member, MemoryMode, PoolError, Timeline,
};

use crate::bench::chart::{Chart, Marks, Series};
use crate::bench::measure::{BenchError, Experiment, Repetitions, Samples, Unit};
use crate::bench::report::Row;
use crate::bench::setting::{Place, Setting};
use crate::bench::subject::{Subject, SubjectSpec, Work, end, passed, wait_answer};
use crate::bench::{Scale, Scenario};

/// See the module's text.
pub(super) const SCENARIO: Scenario = Scenario {
    name: "fanout",
    about: "1 to 1000 clones of one fork point, until the last of them runs",
    reading: "Clock instantiate: from the spawn request on a fork point that exists, with the pool filled before; fill: what that took. process: the clones live in workers, \
              started and filled before. all_running: the last clone has entered its first KVM_RUN; \
              all_acted: the last one's first action was seen. 512 MiB of RAM each, 64 MiB populated; every clone must answer, or the \
              row is not there.",
    experiments,
    charts,
};

fn experiments(scale: Scale) -> Vec<Box<dyn Experiment>> {
    let full = [(1, 60), (10, 30), (32, 15), (100, 10), (300, 3), (1000, 2)];
    let quick = [(1, 10), (10, 3), (32, 2), (100, 2)];
    let small = [(1, 2), (4, 1)];
    let sizes = scale.pick(&full[..], &quick[..], &small[..]);
    let full = [(10, 10), (100, 3), (1000, 2)];
    let quick = [(10, 2), (100, 1)];
    let small = [(4, 1)];
    let in_workers = scale.pick(&full[..], &quick[..], &small[..]);
    let mut all: Vec<Box<dyn Experiment>> = Vec::new();
    for (place, sizes) in [(Place::InProcess, sizes), (Place::Process, in_workers)] {
        for &(clones, measured) in sizes {
            all.push(Box::new(Fanout {
                place,
                clones,
                measured,
                subject: None,
                point: None,
            }));
        }
    }
    all
}

struct Fanout {
    place: Place,
    clones: u32,
    measured: u32,
    // Before the subject: its family ends with that.
    point: Option<Arc<ForkPoint>>,
    subject: Option<Subject>,
}

impl Experiment for Fanout {
    fn name(&self) -> String {
        match self.place {
            Place::InProcess => self.clones.to_string(),
            Place::Process => format!("{}/{}", self.clones, self.place.as_str()),
        }
    }

    fn repetitions(&self) -> Repetitions {
        Repetitions {
            // Of hundreds of clones all but the first few warm up the rest.
            warm_up: u32::from(self.clones <= 100),
            measured: self.measured,
        }
    }

    fn prepare(&mut self) -> Result<(), BenchError> {
        let subject = Subject::boot(&SubjectSpec {
            work: Work {
                read_pages: 1,
                ..Work::default()
            },
            setting: Setting {
                place: self.place,
                ..Setting::PLAIN
            },
            ..SubjectSpec::USUAL
        })?;
        self.point = Some(subject.point(FreezeKind::Remap, MemoryMode::Cow)?);
        self.subject = Some(subject);
        Ok(())
    }

    fn repeat(&mut self, samples: &mut Samples) -> Result<(), BenchError> {
        let Some(point) = &self.point else {
            return Ok(());
        };
        let begun = Instant::now();
        point.fill_pool(self.clones).map_err(|error| match error {
            SpawnError::Shell(PoolError::Limits(limit)) => BenchError::Lacks(limit.to_string()),
            error => error.into(),
        })?;
        let fill = begun.elapsed();
        let asked = Instant::now();
        let clones = match point.spawn(self.clones) {
            Ok(clones) => clones,
            Err(ForkError::Limits(limit)) => return Err(BenchError::Lacks(limit.to_string())),
            Err(error) => return Err(error.into()),
        };
        let measured = measure(&clones, asked);
        end(&clones);
        let [running, acted] = measured?;
        let name = self.name();
        let cases = [
            ("fill", fill),
            ("all_running", running),
            ("all_acted", acted),
        ];
        for (case, took) in cases {
            samples
                .time(&format!("{name}/{case}"), Unit::Ms, took)
                .column("clones", clones.len() as f64)
                .column("memory_mib", point.config().memory_mib as f64);
        }
        Ok(())
    }
}

/// Until the last of them runs, and until the last of them acts. All have answered then.
fn measure(clones: &[Arc<Member>], asked: Instant) -> Result<[Duration; 2], BenchError> {
    let mut last = [asked; 2];
    type Seen = fn(&Timeline) -> Option<Instant>;
    let points: [(&str, Seen); 2] = [
        ("first_run", |seen| seen.first_run),
        ("first_action", |seen| seen.first_action),
    ];
    for clone in clones {
        wait_answer(clone, 1)?;
        for (last, (name, at)) in last.iter_mut().zip(points) {
            *last = passed(clone, name, at)?.max(*last);
        }
    }
    Ok(last.map(|at| at.saturating_duration_since(asked)))
}

fn charts(rows: &[Row]) -> Vec<Chart> {
    let series = |name: &str| Series {
        name: name.to_owned(),
        points: rows
            .iter()
            .filter(|row| {
                row.case
                    .split_once('/')
                    .is_some_and(|(_, case)| case == name)
            })
            .filter_map(|row| {
                let clones = *row.columns.get("clones")?;
                Some((clones, row.percentiles.p50 / clones))
            })
            .collect(),
        marked: true,
    };
    let names = ["all_running", "all_acted", "fill"];
    let in_workers = names.map(|name| format!("{}/{name}", Place::Process.as_str()));
    let all = names
        .into_iter()
        .chain(in_workers.iter().map(String::as_str));
    vec![Chart {
        name: "fanout".into(),
        // In total all curves would lie on one line.
        title: "Clones of one fork point, until the last is there: time for each".into(),
        x: "clones".into(),
        y: "median time / clones, ms".into(),
        log: (true, true),
        marks: Marks::Lines(all.map(series).collect()),
    }]
}
