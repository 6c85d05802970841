//! A fork of a fork of a fork: what each generation costs.

use std::sync::Arc;
use std::time::Instant;

use forkvm_clone_engine::{FreezeKind, Member, MemoryMode};

use crate::bench::chart::{Chart, Marks, Series};
use crate::bench::measure::{BenchError, Experiment, Repetitions, Samples, Unit};
use crate::bench::report::Row;
use crate::bench::subject::{
    PAGES_PER_MIB, Subject, SubjectSpec, end, end_points, fork_by, rewrite, wait_answer,
};
use crate::bench::{Scale, Scenario};

/// See the module's text.
pub(super) const SCENARIO: Scenario = Scenario {
    name: "depth",
    about: "a fork of a fork of a fork, to 20 generations",
    reading: "Clock fork: from the request on a running VM of generation N-1 to the clone of generation N. Lazy, delta; each generation has \
              written 1 MiB of its own, and all ancestors are alive.",
    experiments,
    charts,
};

/// What each generation writes before it is forked.
const DIRTY_MIB: u32 = 1;

/// End points that are noted.
const NOTED: [&str; 2] = ["first_action", "first_answer"];

fn experiments(scale: Scale) -> Vec<Box<dyn Experiment>> {
    vec![Box::new(Depth {
        generations: scale.pick(20, 20, 3),
        measured: scale.pick(12, 4, 1),
        subject: None,
    })]
}

struct Depth {
    generations: u32,
    measured: u32,
    subject: Option<Subject>,
}

impl Experiment for Depth {
    fn name(&self) -> String {
        format!("{}/first_action", self.generations)
    }

    fn repetitions(&self) -> Repetitions {
        Repetitions {
            warm_up: 1,
            measured: self.measured,
        }
    }

    fn prepare(&mut self) -> Result<(), BenchError> {
        let subject = Subject::boot(&SubjectSpec {
            dirty_pages: DIRTY_MIB * PAGES_PER_MIB,
            ..SubjectSpec::USUAL
        })?;
        // From then on it maps its memory privately, as every clone does.
        drop(subject.point(FreezeKind::Remap, MemoryMode::Cow)?);
        self.subject = Some(subject);
        Ok(())
    }

    fn repeat(&mut self, samples: &mut Samples) -> Result<(), BenchError> {
        let Some(subject) = &mut self.subject else {
            return Ok(());
        };
        subject.rewrite()?;
        let mut line: Vec<Arc<Member>> = Vec::new();
        let done = descend(subject.member(), self.generations, &mut line, samples);
        // The youngest first, as a family ends.
        line.reverse();
        end(&line);
        done
    }
}

/// Forks `root`, its clone, and so on; `line` holds those that came of it.
fn descend(
    root: &Arc<Member>,
    generations: u32,
    line: &mut Vec<Arc<Member>>,
    samples: &mut Samples,
) -> Result<(), BenchError> {
    for generation in 1..=generations {
        let parent = line.last().unwrap_or(root).clone();
        if !Arc::ptr_eq(&parent, root) {
            // A clone has been ready as often as it was told to write, from when it was cloned on.
            rewrite(&parent, 1)?;
        }
        let asked = Instant::now();
        let ticket = parent.fork(fork_by(FreezeKind::Delta, MemoryMode::Lazy, 1))?;
        let clone = ticket.clones[0].clone();
        line.push(clone.clone());
        wait_answer(&clone, 1)?;
        let populated = ticket.point.populated_mib();
        let noted = end_points(&clone, asked)?;
        for (end_point, took) in noted.into_iter().filter(|(name, _)| NOTED.contains(name)) {
            samples
                .time(&format!("{generation}/{end_point}"), Unit::Us, took)
                .column("depth", f64::from(clone.identity().depth))
                .column("populated_mib", populated)
                .column("dirty_mib", f64::from(DIRTY_MIB));
        }
    }
    Ok(())
}

fn charts(rows: &[Row]) -> Vec<Chart> {
    let series = |end_point: &str| Series {
        name: end_point.to_owned(),
        points: rows
            .iter()
            .filter(|row| row.case.ends_with(&format!("/{end_point}")))
            .filter_map(|row| Some((*row.columns.get("depth")?, row.percentiles.p50 / 1000.0)))
            .collect(),
        marked: true,
    };
    vec![Chart {
        name: "depth".into(),
        title: "A fork of a fork of a fork".into(),
        x: "generation".into(),
        y: "median time from the request, ms".into(),
        log: (false, false),
        marks: Marks::Lines(NOTED.map(series).to_vec()),
    }]
}
