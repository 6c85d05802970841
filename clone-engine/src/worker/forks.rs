//! Forks of clones that live in a worker: what the worker does is the fork point, all the rest is the
//! engine's.
//!
//! The thread that serves the clone freezes it as any parent is frozen. Where a fork elsewhere would spawn,
//! it describes the fork point to the engine, which makes it one of its own family, spawns the clones
//! wherever they are to live, and says whether they run. Until then the parent's thread waits, so that what
//! follows, a stopped parent's end or its going on, is decided in one place. Pages that the image still
//! misses are this worker's to give ([`crate::page_link`]).

use std::cell::RefCell;
use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use forkvm_abi::errno;
use forkvm_vmm::PausedVm;

use super::Engine;
use super::home::Places;
use crate::descriptor::Description;
use crate::end::End;
use crate::fork::ForkError;
use crate::fork_point::ForkPoint;
use crate::member::{Ask, Elsewhere, Finished, Member, Watch, with_causes};
use crate::page_link::PageLink;
use crate::phase::{Observer, Phase, Vetoed};
use crate::spawn::{SpawnError, Spawner};
use crate::wire::{ForkMade, NotForked, Refusal, Told, shortened};

/// The spawner of a worker's family.
pub(super) struct Forks {
    pub(super) engine: Arc<Engine>,
    pub(super) pages: Arc<PageLink>,
    pub(super) places: Arc<Places>,
    pub(super) answers: Arc<Answers>,
}

impl Spawner for Forks {
    fn name(&self) -> &'static str {
        "engine"
    }

    fn apart(&self) -> bool {
        true
    }

    fn publish(&self, point: &Arc<ForkPoint>) -> Result<(), ForkError> {
        Ok(self.hand_over(point, 0)?)
    }

    fn spawn(
        &self,
        point: &Arc<ForkPoint>,
        count: u32,
        _asked: Instant,
    ) -> Result<Vec<Arc<Member>>, ForkError> {
        // Only a guest joins its clones. The host's have their handles where it is.
        let brood = if point.by_guest() { count } else { 0 };
        let number = point.handed_out.number();
        let watches: Vec<_> = (0..brood)
            .map(|_| Arc::new(Watch::new(point.parent.clone(), None)))
            .collect();
        self.answers.expect_ends(number, &watches);
        self.hand_over(point, count)
            .inspect_err(|_refused| self.answers.expect_ends(number, &[]))?;
        let stranger = |watch: Arc<Watch>| {
            let name = format!("a clone of {}", point.parent.name);
            let config = point.config().clone();
            Arc::new(Member::elsewhere(name, config, Arc::new(Stranger), watch))
        };
        Ok(watches.into_iter().map(stranger).collect())
    }
}

impl Forks {
    /// Has the engine make `clones` clones of `point`, and waits until they run.
    fn hand_over(&self, point: &ForkPoint, clones: u32) -> Result<(), SpawnError> {
        let number = point.handed_out.number();
        let gone = |why: &str| {
            SpawnError::Refused(Refusal {
                why: why.into(),
                errno: errno::EIO,
                point: number,
            })
        };
        let clone = self.places.number_of(&point.parent);
        let clone = clone.ok_or_else(|| gone("the engine knows no such clone"))?;
        let Description { files, filling } = point.describe()?;
        for image in &filling {
            self.pages.offer(image, point.touches.clone());
        }
        let files: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
        let (answer, outcome) = channel();
        self.answers.await_outcome(number, answer);
        let Making { phases, paused } = MAKING.take();
        let froze = Told::Froze {
            clone,
            point: number,
            by_guest: point.by_guest(),
            clones,
            requested: point.requested.into(),
            phases,
            paused,
        };
        self.engine.tell(&froze, &files);
        point.handed_out.keep(Box::new(Known {
            engine: self.engine.clone(),
            point: number,
        }));
        let outcome = outcome.recv();
        outcome
            .map_err(|_closed| gone("the engine has gone"))?
            .map_err(SpawnError::Refused)
    }
}

/// A fork point that the engine knows. Dropped with it, that is told.
struct Known {
    engine: Arc<Engine>,
    point: u64,
}

impl Drop for Known {
    fn drop(&mut self) {
        self.engine.tell(&Told::Forget { point: self.point }, &[]);
    }
}

/// A clone of a clone, wherever it lives: here only its end is heard of.
struct Stranger;

impl Elsewhere for Stranger {
    fn process(&self) -> u32 {
        std::os::unix::process::parent_id()
    }

    fn ask(&self, _ask: Ask) -> bool {
        false
    }
}

/// What the threads that fork wait for.
#[derive(Default)]
pub(super) struct Answers(Mutex<Awaited>);

#[derive(Default)]
struct Awaited {
    /// The engine has gone: nothing comes any more.
    closed: bool,
    outcomes: HashMap<u64, Sender<Result<(), Refusal>>>,
    /// Clones of each fork point that have not ended.
    ends: HashMap<u64, Vec<Option<Arc<Watch>>>>,
}

impl Answers {
    fn lock(&self) -> MutexGuard<'_, Awaited> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn await_outcome(&self, point: u64, answer: Sender<Result<(), Refusal>>) {
        let mut awaited = self.lock();
        if !awaited.closed {
            awaited.outcomes.insert(point, answer);
        }
    }

    fn expect_ends(&self, point: u64, clones: &[Arc<Watch>]) {
        let mut awaited = self.lock();
        if clones.is_empty() {
            awaited.ends.remove(&point);
        } else {
            let clones = clones.iter().cloned().map(Some);
            awaited.ends.insert(point, clones.collect());
        }
    }

    /// The engine says what became of a fork point.
    pub(super) fn spawned(&self, point: u64, outcome: Result<(), Refusal>) {
        let waits = self.lock().outcomes.remove(&point);
        if waits.is_none_or(|waits| waits.send(outcome).is_err()) {
            tracing::debug!(point, "nobody waits for what became of a fork point");
        }
    }

    /// The engine says that a clone of a fork point has ended.
    pub(super) fn ended(&self, point: u64, index: u32, end: End) {
        let watch = {
            let mut awaited = self.lock();
            let Some(clones) = awaited.ends.get_mut(&point) else {
                return;
            };
            let clone = clones.get_mut(index as usize).and_then(Option::take);
            if clones.iter().all(Option::is_none) {
                awaited.ends.remove(&point);
            }
            clone
        };
        if let Some(watch) = watch {
            watch.finish(Finished {
                end,
                disks: Vec::new(),
                blk_counters: Vec::new(),
            });
        }
    }

    /// Nothing comes any more, and whoever waits hears so.
    pub(super) fn close(&self) {
        let mut awaited = self.lock();
        awaited.closed = true;
        awaited.outcomes.clear();
    }
}

/// What came of a fork, as the engine is told; and what must not go before that was told.
pub(super) fn told(
    forked: Result<(u32, Arc<ForkPoint>), ForkError>,
) -> (Result<ForkMade, NotForked>, Option<Arc<ForkPoint>>) {
    let not_forked = match forked {
        Ok((ticket, point)) => {
            let made = ForkMade {
                ticket,
                point: point.handed_out.number(),
            };
            return (Ok(made), Some(point));
        }
        Err(ForkError::Limits(limits)) => NotForked::Limits(limits),
        Err(ForkError::Spawn(SpawnError::Refused(Refusal { point, .. }))) => {
            NotForked::Refused { point }
        }
        Err(error) => NotForked::Failed(shortened(with_causes(&error))),
    };
    (Err(not_forked), None)
}

/// The fork point that a thread is making.
#[derive(Default)]
struct Making {
    phases: Vec<(Phase, u64)>,
    paused: Option<u64>,
}

thread_local! {
    /// A VM is forked by the thread that serves it, from the request to the hand-over.
    static MAKING: RefCell<Making> = RefCell::default();
}

/// Keeps the phases of a fork, to be told with the fork point. The worker's own observer hears of them as they
/// happen.
pub(super) struct ForkPhases(pub(super) Arc<dyn Observer>);

impl Observer for ForkPhases {
    fn enter(&self, phase: Phase, paused: Option<&PausedVm<'_>>) -> Result<(), Vetoed> {
        if phase == Phase::Request {
            MAKING.set(Making::default());
        }
        self.0.enter(phase, paused)
    }

    fn leave(&self, phase: Phase, took: Duration) {
        let nanos = took.as_nanos() as u64;
        MAKING.with_borrow_mut(|making| making.phases.push((phase, nanos)));
        self.0.leave(phase, took);
    }

    fn parent_paused(&self, took: Duration) {
        MAKING.with_borrow_mut(|making| making.paused = Some(took.as_nanos() as u64));
        self.0.parent_paused(took);
    }

    fn forked(&self, _point: &Arc<ForkPoint>, _clones: &[Arc<Member>]) {}
}
