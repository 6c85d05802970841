//! What a VM has shown so far, and who waits for it.
//!
//! vCPU threads write here what they see (a start, a report), so that a guest that reports without
//! end is slowed by the lock and fills no queue. What needs an answer goes through the inbox.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use forkvm_abi::doorbell::report;

use super::{Finished, Life};
use crate::end::End;
use crate::identity::Identity;
use crate::timeline::Timeline;

/// Reports that are kept: the first ones. And values that are counted, likewise.
const REPORTS: usize = 4096;

/// Told of an end.
type WhenEnded = Box<dyn FnOnce(&End) + Send>;

/// See the module's text.
pub(super) struct Seen {
    /// The life that all but the end is of.
    life: u32,
    pub(super) identity: Identity,
    pub(super) timeline: Timeline,
    /// Its owner holds it, through all its lives.
    pub(super) held: bool,
    /// The first [`REPORTS`] of them.
    pub(super) reports: Vec<(u32, Instant)>,
    /// How often each value was reported, of the first [`REPORTS`] values.
    counts: HashMap<u32, usize>,
    pub(super) finished: Option<Finished>,
    /// Called once at the end.
    pub(super) when_ended: Vec<WhenEnded>,
}

impl Seen {
    /// Whether the guest was seen to act in the life `number`, or that is over.
    pub(super) fn has_acted_in(&self, number: u32) -> bool {
        self.life != number || self.timeline.first_action.is_some() || self.finished.is_some()
    }

    /// Who it has become elsewhere; what it is called is not for others to say.
    fn renewed(&self, identity: Identity) -> Identity {
        Identity {
            name: self.identity.name.clone(),
            depth: self.identity.depth,
            ..identity
        }
    }

    fn begin(&mut self, life: u32, identity: Identity, timeline: Timeline) {
        self.life = life;
        self.identity = identity;
        self.timeline = timeline;
        self.reports.clear();
        self.counts.clear();
    }

    /// How often `value` was reported.
    pub(super) fn count(&self, value: u32) -> usize {
        self.counts.get(&value).copied().unwrap_or(0)
    }
}

/// Hears what a VM shows, for somebody who holds no handle of it. Called by the threads in which it
/// happens, in the order in which it does.
pub(crate) trait Witness: Send + Sync {
    /// The first KVM_RUN is entered.
    fn ran(&self, at: Instant);

    /// The guest did something that is seen outside, for the first time.
    fn acted(&self, at: Instant);

    /// The guest reported something that is kept or counted.
    fn reported(&self, value: u32, at: Instant);

    /// It was forked, and who it is says so.
    fn forked(&self, identity: &Identity);

    /// It was rewound: what comes now is of another life.
    fn reborn(&self, identity: &Identity, timeline: &Timeline);

    /// The VM is gone.
    fn ended(&self, finished: &Finished);
}

/// A [`Seen`] that can be waited for.
pub(crate) struct Watch {
    seen: Mutex<Seen>,
    changed: Condvar,
    witness: Option<Arc<dyn Witness>>,
}

impl Watch {
    pub(crate) fn new(identity: Identity, witness: Option<Arc<dyn Witness>>) -> Watch {
        let seen = Seen {
            life: Life::FIRST,
            identity,
            timeline: Timeline::default(),
            held: false,
            reports: Vec::new(),
            counts: HashMap::new(),
            finished: None,
            when_ended: Vec::new(),
        };
        Watch {
            seen: Mutex::new(seen),
            changed: Condvar::new(),
            witness,
        }
    }

    /// What is known of its start from before it runs.
    pub(crate) fn begin(&self, timeline: Timeline) {
        self.lock().timeline = timeline;
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Seen> {
        // Nothing that can panic runs under this lock.
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_in(&self, life: u32) -> Option<MutexGuard<'_, Seen>> {
        let seen = self.lock();
        (seen.life == life).then_some(seen)
    }

    /// Forgets what was seen of the life before; what is told of that late is not seen.
    pub(super) fn begin_life(&self, life: u32, identity: Identity, timeline: Timeline) {
        if let Some(witness) = &self.witness {
            witness.reborn(&identity, &timeline);
        }
        self.lock().begin(life, identity, timeline);
    }

    /// The same for a VM that lives elsewhere, and counts its lives there.
    pub(crate) fn begin_next_life(&self, identity: Identity, timeline: Timeline) {
        let mut seen = self.lock();
        let life = seen.life + 1;
        let identity = seen.renewed(identity);
        let timeline = Timeline {
            fork_requested: seen.timeline.fork_requested,
            ..timeline
        };
        seen.begin(life, identity, timeline);
    }

    /// The life that it is in.
    pub(crate) fn life(&self) -> u32 {
        self.lock().life
    }

    /// It is held, or was let go.
    pub(crate) fn hold(&self, held: bool) {
        self.lock().held = held;
    }

    /// It was forked; who it is now.
    pub(super) fn forked(&self) -> Identity {
        let mut seen = self.lock();
        seen.identity.fork_count += 1;
        seen.identity.clone_id = 0;
        let identity = seen.identity.clone();
        drop(seen);
        if let Some(witness) = &self.witness {
            witness.forked(&identity);
        }
        identity
    }

    /// Who it is has changed elsewhere.
    pub(crate) fn identify(&self, identity: Identity) {
        let mut seen = self.lock();
        seen.identity = seen.renewed(identity);
    }

    /// Who it is.
    pub(crate) fn identity(&self) -> Identity {
        self.lock().identity.clone()
    }

    /// The first KVM_RUN of this life is entered.
    pub(crate) fn ran(&self, life: u32, at: Instant) {
        let Some(mut seen) = self.lock_in(life) else {
            return;
        };
        seen.timeline.first_run.get_or_insert(at);
        drop(seen);
        if let Some(witness) = &self.witness {
            witness.ran(at);
        }
    }

    /// The guest did something that is seen outside.
    pub(crate) fn acted(&self, life: u32, at: Instant) {
        let Some(mut seen) = self.lock_in(life) else {
            return;
        };
        let first_action = &mut seen.timeline.first_action;
        let first = first_action.is_none() && first_action.replace(at).is_none();
        drop(seen);
        if let (true, Some(witness)) = (first, &self.witness) {
            witness.acted(at);
        }
    }

    /// The guest reported something.
    pub(crate) fn reported(&self, life: u32, value: u32, at: Instant) {
        let Some(mut seen) = self.lock_in(life) else {
            return;
        };
        seen.timeline.first_action.get_or_insert(at);
        if value == report::ANSWER {
            seen.timeline.first_answer.get_or_insert(at);
        }
        let kept = seen.reports.len() < REPORTS;
        if kept {
            seen.reports.push((value, at));
        }
        let counted = seen.counts.len() < REPORTS || seen.counts.contains_key(&value);
        if counted {
            *seen.counts.entry(value).or_default() += 1;
        }
        drop(seen);
        if counted {
            self.changed.notify_all();
        }
        if let (true, Some(witness)) = (kept || counted, &self.witness) {
            witness.reported(value, at);
        }
    }

    /// The VM is gone.
    pub(crate) fn finish(&self, finished: Finished) {
        let end = finished.end.clone();
        let mut seen = self.lock();
        seen.finished = Some(finished.clone());
        let calls = std::mem::take(&mut seen.when_ended);
        drop(seen);
        self.changed.notify_all();
        if let Some(witness) = &self.witness {
            witness.ended(&finished);
        }
        calls.into_iter().for_each(|call| call(&end));
    }

    /// Has `call` called at the end, or now if that was before.
    pub(super) fn when_ended(&self, call: impl FnOnce(&End) + Send + 'static) {
        let mut seen = self.lock();
        let Some(end) = seen.finished.as_ref().map(|finished| finished.end.clone()) else {
            seen.when_ended.push(Box::new(call));
            return;
        };
        drop(seen);
        call(&end);
    }

    /// Waits until it is `enough`, or until `deadline` has passed.
    pub(super) fn wait_until(
        &self,
        deadline: Option<Duration>,
        enough: impl Fn(&Seen) -> bool,
    ) -> MutexGuard<'_, Seen> {
        let until = deadline.map(|deadline| Instant::now() + deadline);
        let mut seen = self.lock();
        while !enough(&seen) {
            seen = match until {
                None => self
                    .changed
                    .wait(seen)
                    .unwrap_or_else(PoisonError::into_inner),
                Some(until) => {
                    let left = until.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return seen;
                    }
                    let waited = self.changed.wait_timeout(seen, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        seen
    }
}
