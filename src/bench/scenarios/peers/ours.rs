//! Clones of forkvm: what the peers are held against.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use forkvm_clone_engine::{ForkPoint, FreezeKind, MemoryMode};

use crate::bench::measure::{BenchError, Experiment, Repetitions, Samples, Unit};
use crate::bench::setting::Pool;
use crate::bench::subject::{Subject, SubjectSpec, end, passed, spawn_one};

/// A fork point that all experiments of the scenario share, made when the first of them needs it.
#[derive(Clone, Default)]
pub(super) struct Ours(Rc<RefCell<Option<Parent>>>);

struct Parent {
    // Before the subject: its family ends with that.
    point: Arc<ForkPoint>,
    #[expect(dead_code, reason = "the family of the fork point ends with it")]
    subject: Subject,
}

impl Parent {
    fn boot() -> Result<Parent, BenchError> {
        let subject = Subject::boot(&SubjectSpec {
            own_forks: (FreezeKind::Remap, MemoryMode::Cow),
            ..SubjectSpec::USUAL
        })?;
        let (point, elder) = subject.own_fork()?;
        end(&[elder]);
        Ok(Parent { point, subject })
    }
}

impl Ours {
    /// Has the fork point there.
    pub(super) fn prepare(&self) -> Result<(), BenchError> {
        self.point().map(drop)
    }

    fn point(&self) -> Result<Arc<ForkPoint>, BenchError> {
        let mut parent = self.0.borrow_mut();
        let parent = match &mut *parent {
            Some(parent) => parent,
            none => none.insert(Parent::boot()?),
        };
        Ok(parent.point.clone())
    }

    /// Starts one clone, its VM built before or not; how long it took to its first action.
    pub(super) fn start(&self, pool: Pool) -> Result<Duration, BenchError> {
        let point = self.point()?;
        if pool == Pool::Pooled {
            // The one that is taken is not replaced, so an unpooled clone finds none.
            point.fill_pool(1)?;
        }
        let (clone, _) = spawn_one(&point)?;
        let asked = passed(&clone, "spawn_requested", |seen| seen.spawn_requested)?;
        let acted = passed(&clone, "first_action", |seen| seen.first_action)?;
        end(&[clone]);
        Ok(acted.saturating_duration_since(asked))
    }
}

/// Clones by themselves.
pub(super) struct Clones {
    pub(super) ours: Ours,
    pub(super) pool: Pool,
    pub(super) measured: u32,
}

impl Experiment for Clones {
    fn name(&self) -> String {
        format!("forkvm/{}", self.pool.as_str())
    }

    fn repetitions(&self) -> Repetitions {
        Repetitions {
            warm_up: self.measured.min(5),
            measured: self.measured,
        }
    }

    fn prepare(&mut self) -> Result<(), BenchError> {
        self.ours.prepare()
    }

    fn repeat(&mut self, samples: &mut Samples) -> Result<(), BenchError> {
        let took = self.ours.start(self.pool)?;
        samples.time(&self.name(), Unit::Us, took);
        Ok(())
    }
}
