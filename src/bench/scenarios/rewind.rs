//! From the request to rewind a clone that has written pages until it acts at its fork point again.

use std::sync::Arc;
use std::time::Instant;

use forkvm_clone_engine::{ForkPoint, FreezeKind, Member, MemoryMode, RewindWay};
use forkvm_vmm::Kvm;

use crate::bench::chart::{self, Chart};
use crate::bench::measure::{BenchError, Experiment, Repetitions, Samples, Unit};
use crate::bench::report::Row;
use crate::bench::subject::{Subject, SubjectSpec, Work, end, passed, spawn_one, wait_answer};
use crate::bench::{Scale, Scenario};

/// See the module's text.
pub(super) const SCENARIO: Scenario = Scenario {
    name: "rewind",
    about: "a clone that has written 512 pages back at its fork point, to its first action there",
    reading: "From the request until the clone's first action at its fork point; it had written so many pages. 512 MiB of RAM, 64 MiB \
              populated, 1 vCPU, a whole image. fresh-shell takes the VM from a pool that was filled before. in-place is left out where \
              KVM shadows page tables.",
    experiments,
    charts,
};

/// Pages that the clone writes in each of its lives.
const PAGES: u32 = 512;

fn experiments(scale: Scale) -> Vec<Box<dyn Experiment>> {
    let measured = scale.pick(200, 40, 3);
    let ways = [
        RewindWay::InPlace,
        RewindWay::FreshShell,
        RewindWay::SlotReadd,
    ];
    let experiment = |way| -> Box<dyn Experiment> {
        Box::new(Rewind {
            way,
            measured,
            clone: None,
            point: None,
            subject: None,
        })
    };
    ways.into_iter().map(experiment).collect()
}

struct Rewind {
    way: RewindWay,
    measured: u32,
    clone: Option<Arc<Member>>,
    point: Option<Arc<ForkPoint>>,
    // After the others: the family ends with it.
    subject: Option<Subject>,
}

impl Experiment for Rewind {
    fn name(&self) -> String {
        format!("{}/{PAGES}-pages", self.way)
    }

    fn repetitions(&self) -> Repetitions {
        Repetitions {
            warm_up: self.measured.min(5),
            measured: self.measured,
        }
    }

    fn prepare(&mut self) -> Result<(), BenchError> {
        let subject = Subject::boot(&SubjectSpec {
            work: Work {
                write_pages: PAGES,
                ..Work::default()
            },
            ..SubjectSpec::USUAL
        })?;
        if self.way == RewindWay::InPlace && !Arc::new(Kvm::open()?).sees_rewritten_tables()? {
            return Err(BenchError::Lacks(
                "this KVM shadows page tables: in-place is refused here".into(),
            ));
        }
        let point = subject.point(FreezeKind::Remap, MemoryMode::Cow)?;
        let (clone, _) = spawn_one(&point)?;
        self.clone = Some(clone);
        self.point = Some(point);
        self.subject = Some(subject);
        Ok(())
    }

    fn repeat(&mut self, samples: &mut Samples) -> Result<(), BenchError> {
        let (Some(clone), Some(point)) = (&self.clone, &self.point) else {
            return Ok(());
        };
        if self.way == RewindWay::FreshShell {
            point.fill_pool(1)?;
        }
        let asked = Instant::now();
        clone.rewind(self.way)?;
        wait_answer(clone, 1)?;
        let acted = passed(clone, "first_action", |seen| seen.first_action)?;
        let took = acted.saturating_duration_since(asked);
        samples
            .time(&self.name(), Unit::Us, took)
            .column("memory_mib", point.config().memory_mib as f64)
            .column("pages_written", f64::from(PAGES));
        Ok(())
    }
}

impl Drop for Rewind {
    fn drop(&mut self) {
        if let Some(clone) = self.clone.take() {
            end(&[clone]);
        }
    }
}

fn charts(rows: &[Row]) -> Vec<Chart> {
    let curves = rows
        .iter()
        .map(|row| (row.case.clone(), row.values.as_slice()));
    vec![chart::distribution(
        "rewind",
        "Rewind a clone that has written 512 pages",
        "time from the request to the first action, us",
        curves,
    )]
}
