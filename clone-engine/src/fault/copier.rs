//! Brings what no clone waits for: working sets that are replayed, at once, and then everything
//! else, a little at a time.
//!
//! Faults are answered by the fault threads whatever the copier does. A working set goes before all
//! that is filled in the background, and that sleeps as much as its rate asks. An image is filled a
//! moment after its fork, so that the clones' start has the host to itself.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::counters::Cause;
use crate::image::{MemoryImage, Which};
use crate::source::SourceError;
use crate::working_set::WorkingSet;

/// How long an image is left alone at first.
const LEAVE_ALONE: Duration = Duration::from_millis(100);

/// Bytes between two rests.
const STRETCH: u64 = 1 << 20;

/// See the module's text.
pub(super) struct Copier {
    shared: Arc<Shared>,
    /// MiB a second in the background.
    rate: u32,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    replays: VecDeque<(Weak<MemoryImage>, WorkingSet)>,
    waiting: VecDeque<(Instant, Weak<MemoryImage>)>,
    over: bool,
}

impl Copier {
    /// One that fills images at `rate` MiB a second at most.
    pub(super) fn new(rate: Option<u32>) -> Copier {
        Copier {
            shared: Arc::default(),
            rate: rate.unwrap_or(u32::MAX),
            thread: Mutex::default(),
        }
    }

    /// Fills `image` when its turn comes.
    pub(super) fn add(&self, image: &Arc<MemoryImage>) {
        let image = (Instant::now() + LEAVE_ALONE, Arc::downgrade(image));
        self.shared.lock().waiting.push_back(image);
        self.awake();
    }

    /// Brings what is missing of `set` into `image` now.
    pub(super) fn replay(&self, image: &Arc<MemoryImage>, set: WorkingSet) {
        let replay = (Arc::downgrade(image), set);
        self.shared.lock().replays.push_back(replay);
        self.awake();
    }

    fn awake(&self) {
        self.shared.changed.notify_all();
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if thread.is_none() {
            let (shared, rate) = (self.shared.clone(), self.rate);
            let copy = move || shared.copy(rate);
            match thread::Builder::new().name("copier".into()).spawn(copy) {
                Ok(started) => *thread = Some(started),
                // Clones fetch what they touch all the same.
                Err(error) => tracing::warn!(%error, "no thread to fill images in the background"),
            }
        }
    }

    /// Ends it, for good.
    pub(super) fn end(&self) {
        self.shared.lock().over = true;
        self.shared.changed.notify_all();
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Err(_panic)) = thread.take().map(JoinHandle::join) {
            tracing::error!("the copier panicked");
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn copy(&self, mib_per_second: u32) {
        let rest = Duration::from_secs(1) * (STRETCH >> 20) as u32 / mib_per_second.max(1);
        while let Some(image) = self.next() {
            let mut from = 0;
            while !self.lock().over {
                // Not held while it rests: an image that nobody needs goes.
                let Some(image) = image.upgrade() else { break };
                match stretch(&image, from) {
                    Ok(Some(end)) => from = end,
                    Ok(None) => {
                        image.settle();
                        break;
                    }
                    Err(why) => {
                        tracing::warn!(%why, "an image is not filled in the background any more");
                        break;
                    }
                }
                drop(image);
                if !self.rest_until(Instant::now() + rest) {
                    return;
                }
            }
        }
    }

    /// The next image, when its time has come. `None` at the end.
    fn next(&self) -> Option<Weak<MemoryImage>> {
        let mut state = self.lock();
        loop {
            state = self.serve_replays(state);
            if state.over {
                return None;
            }
            if let Some((when, image)) = state.waiting.pop_front() {
                drop(state);
                return self.rest_until(when).then_some(image);
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Whether that time came before the end.
    fn rest_until(&self, when: Instant) -> bool {
        let mut state = self.lock();
        loop {
            state = self.serve_replays(state);
            if state.over {
                return false;
            }
            let left = when.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return true;
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Replays what waits for it, with the lock open.
    fn serve_replays<'a>(&'a self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        while !state.over
            && let Some((image, set)) = state.replays.pop_front()
        {
            drop(state);
            // An image that nobody needs is gone.
            if let Some(image) = image.upgrade()
                && let Err(why) = image.replay(&set)
            {
                // Who touches what is left hears why.
                tracing::debug!(%why, "a working set is not replayed to its end");
            }
            state = self.lock();
        }
        state
    }
}

/// Brings the next megabyte from `from` on; where it ends, or `None` when nothing is missing.
fn stretch(image: &Arc<MemoryImage>, mut from: u64) -> Result<Option<u64>, SourceError> {
    let mut brought = 0;
    while brought < STRETCH {
        let next = image.fill_next(from, Which::All, Cause::Background);
        let Some((range, filled)) = next else {
            return Ok(None);
        };
        match filled {
            Ok(()) => {}
            // Whoever needs it will hear why; the rest can be brought.
            Err(why @ (SourceError::Damaged { .. } | SourceError::Rubbish { .. })) => {
                tracing::warn!(%why, "memory that cannot be brought is left out");
            }
            Err(why) => return Err(why),
        }
        brought += range.end - range.start;
        from = range.end;
    }
    Ok(Some(from))
}
