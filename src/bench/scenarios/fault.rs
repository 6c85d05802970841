//! What a page costs a clone when it first touches it.

use std::sync::Arc;

use forkvm_clone_engine::{ForkPoint, FreezeKind, MemoryMode, WorkingSetPolicy};

use crate::bench::chart::{Chart, Marks, Series};
use crate::bench::measure::{BenchError, Experiment, Repetitions, Samples, Unit};
use crate::bench::report::Row;
use crate::bench::subject::{Subject, SubjectSpec, Work, end, passed, spawn_one};
use crate::bench::{Scale, Scenario};

/// See the module's text.
pub(super) const SCENARIO: Scenario = Scenario {
    name: "fault",
    about: "a page that a clone touches for the first time: from the parent, after a sibling, replayed, from a whole image",
    reading: "A clone's time from its first action to its answer, divided by the pages that it read and checked in between. first: of a \
              cold image; sibling: by the next clone of the same fork point; replayed: by the first clone, while the working set of the fork \
              point before is brought; cow: of a whole image. Pages in order, or scattered so \
              that neighbours in time are never in one chunk. chunk-N-KiB: so much is brought at once (64 by default).",
    experiments,
    charts,
};

/// Chunks that are tried beside the engine's default, in KiB.
const CHUNKS: [u64; 4] = [4, 16, 256, 1024];

fn experiments(scale: Scale) -> Vec<Box<dyn Experiment>> {
    let measured = scale.pick(8, 3, 1);
    let pages = scale.pick(4096, 2048, 128);
    let touch = |from, scattered, chunk_kib: Option<u64>| -> Box<dyn Experiment> {
        Box::new(Touch {
            from,
            work: Work {
                read_pages: pages,
                scattered,
                ..Work::default()
            },
            chunk_kib,
            measured,
            point: None,
            subject: None,
        })
    };
    let mut all = Vec::new();
    for scattered in [false, true] {
        for from in [Origin::Parent, Origin::Replay, Origin::Whole] {
            all.push(touch(from, scattered, None));
        }
    }
    for chunk in CHUNKS {
        all.push(touch(Origin::Parent, false, Some(chunk)));
    }
    all
}

/// Where the first clone of a fork point has its pages from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// The parent, at its touch. A sibling has them from there.
    Parent,
    /// The parent, ahead of its touch if that comes late enough: an earlier clone touched the same.
    Replay,
    /// A whole image.
    Whole,
}

struct Touch {
    from: Origin,
    work: Work,
    chunk_kib: Option<u64>,
    measured: u32,
    // Before the subject: its family ends with that.
    point: Option<Arc<ForkPoint>>,
    subject: Option<Subject>,
}

impl Touch {
    /// `kind` of touch of this experiment.
    fn case(&self, kind: &str) -> String {
        let chunk = self
            .chunk_kib
            .map(|kib| format!("/chunk-{kib}-KiB"))
            .unwrap_or_default();
        let order = if self.work.scattered {
            "/scattered"
        } else {
            ""
        };
        let mode = match self.from {
            Origin::Parent | Origin::Replay => MemoryMode::Lazy,
            Origin::Whole => MemoryMode::Cow,
        };
        format!("{}/{kind}{order}{chunk}", mode.as_str())
    }

    /// Lets one clone read its pages, and notes what one of them took.
    fn read(
        &self,
        point: &Arc<ForkPoint>,
        kind: &str,
        samples: &mut Samples,
    ) -> Result<(), BenchError> {
        let (clone, _) = spawn_one(point)?;
        let begun = passed(&clone, "first_action", |seen| seen.first_action)?;
        let done = passed(&clone, "first_answer", |seen| seen.first_answer)?;
        end(&[clone]);
        let each = done.saturating_duration_since(begun) / self.work.read_pages;
        samples
            .time(&self.case(kind), Unit::Us, each)
            .column("pages", f64::from(self.work.read_pages))
            .column("chunk_kib", self.chunk_kib.unwrap_or(64) as f64);
        Ok(())
    }
}

impl Experiment for Touch {
    fn name(&self) -> String {
        self.case(match self.from {
            Origin::Parent | Origin::Whole => "first",
            Origin::Replay => "replayed",
        })
    }

    fn repetitions(&self) -> Repetitions {
        Repetitions {
            warm_up: 1,
            measured: self.measured,
        }
    }

    fn prepare(&mut self) -> Result<(), BenchError> {
        let subject = Subject::boot(&SubjectSpec {
            work: self.work,
            chunk: self.chunk_kib.map(|kib| kib << 10),
            working_set: match self.from {
                Origin::Parent | Origin::Whole => WorkingSetPolicy::Off,
                Origin::Replay => WorkingSetPolicy::RecordAndReplay,
            },
            ..SubjectSpec::USUAL
        })?;
        if self.from == Origin::Whole {
            self.point = Some(subject.point(FreezeKind::Remap, MemoryMode::Cow)?);
        }
        self.subject = Some(subject);
        Ok(())
    }

    fn repeat(&mut self, samples: &mut Samples) -> Result<(), BenchError> {
        match (&self.point, &self.subject) {
            (Some(point), _) => self.read(point, "first", samples),
            (None, Some(subject)) => {
                let cold = subject.point(FreezeKind::WriteProtect, MemoryMode::Lazy)?;
                match self.from {
                    // The warm-up's clone was the first, of which the others have the working set.
                    Origin::Replay => self.read(&cold, "replayed", samples),
                    Origin::Parent | Origin::Whole => {
                        self.read(&cold, "first", samples)?;
                        self.read(&cold, "sibling", samples)
                    }
                }
            }
            (None, None) => Ok(()),
        }
    }
}

/// A page by what is brought with it.
fn charts(rows: &[Row]) -> Vec<Chart> {
    let curve = |kind: &str| {
        let beginning = format!("lazy/{kind}");
        let of_kind = rows.iter().filter(|row| {
            row.case == beginning || row.case.starts_with(&format!("{beginning}/chunk-"))
        });
        let point = |row: &Row| Some((*row.columns.get("chunk_kib")?, row.percentiles.p50));
        let mut points: Vec<_> = of_kind.filter_map(point).collect();
        points.sort_by(|one, next| one.0.total_cmp(&next.0));
        Series {
            name: kind.to_owned(),
            points,
            marked: true,
        }
    };
    vec![Chart {
        name: "fault-by-chunk".into(),
        title: "A page of a lazy clone, by how much is brought at once".into(),
        x: "chunk, KiB".into(),
        y: "median per page, us".into(),
        // From 0 on: the curves hardly differ, and should look like it.
        log: (true, false),
        marks: Marks::Lines(vec![curve("first"), curve("sibling")]),
    }]
}
