//! Fetches pages from a source that is not at hand, in a thread of its own for each such source.
//!
//! Fault threads never wait for a source: they leave what they want here and go on. Order of
//! service: faults, then prefetch, then background. A source that is silent for too long is given up
//! by the supervisor ([`Fetcher::busy_for`]); its thread then ends when the call comes back.

use std::collections::VecDeque;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use super::counters::Cause;
use crate::image::{ImageSink, MemoryImage};
use crate::source::{PageSink, PageSource, SourceError};

/// Most ranges of one call of a source.
const BATCH: usize = 16;

/// How far a source is told to look ahead of a fault.
const AHEAD: u64 = 512 << 10;

/// Waits for pages that a fetcher brings.
pub(crate) trait Waiter: Send + Sync {
    /// They are in the image.
    fn arrived(&self, range: &Range<u64>);

    /// They will never be.
    fn lost(&self, why: &SourceError);
}

/// Those who may touch pages that are fetched ahead: they fault and ask for themselves.
pub(crate) struct Nobody;

impl Waiter for Nobody {
    fn arrived(&self, _range: &Range<u64>) {}

    fn lost(&self, why: &SourceError) {
        tracing::debug!(%why, "pages do not come ahead");
    }
}

/// See the module's text.
#[derive(Default)]
pub(crate) struct Fetcher {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    wanted: Condvar,
}

#[derive(Default)]
struct State {
    /// By urgency: faults, prefetch, background.
    queues: [VecDeque<Want>; 3],
    /// What the source was asked for and has not answered.
    in_hand: Vec<Want>,
    since: Option<Instant>,
    started: bool,
    over: bool,
}

struct Want {
    range: Range<u64>,
    cause: Cause,
    waiter: Arc<dyn Waiter>,
    /// Its call failed together with others: one bad page must not cost those that wait for others.
    alone: bool,
}

impl Want {
    /// The source has failed; its pages may have come all the same, by their VM's own write.
    fn tell(&self, image: &MemoryImage, why: &SourceError) {
        if image.has(&self.range) {
            self.waiter.arrived(&self.range);
        } else {
            self.waiter.lost(why);
        }
    }
}

impl Fetcher {
    /// Asks for own pages of `image`; `waiter` will be told, unless this is an error.
    pub(crate) fn want(
        &self,
        image: &Arc<MemoryImage>,
        source: &Arc<dyn PageSource>,
        range: Range<u64>,
        cause: Cause,
        waiter: &Arc<dyn Waiter>,
    ) -> Result<(), SourceError> {
        let mut state = self.shared.lock();
        if state.over {
            // The image has given its source up meanwhile; it knows why by now.
            let (name, why) = (source.name(), "it was given up".to_owned());
            return Err(SourceError::Gone { name, why });
        }
        if !state.started {
            self.start(image, source)?;
            state.started = true;
        }
        state.queues[urgency(cause)].push_back(Want {
            range,
            cause,
            waiter: waiter.clone(),
            alone: false,
        });
        drop(state);
        self.shared.wanted.notify_one();
        Ok(())
    }

    fn start(
        &self,
        image: &Arc<MemoryImage>,
        source: &Arc<dyn PageSource>,
    ) -> Result<(), SourceError> {
        let (shared, image, from) = (self.shared.clone(), Arc::downgrade(image), source.clone());
        let started = thread::Builder::new()
            .name("fetch".into())
            .spawn(move || shared.serve(&image, from.as_ref()));
        started
            .map(|_detached| ())
            .map_err(|error| SourceError::Gone {
                name: source.name(),
                why: format!("no thread to fetch from it: {error}"),
            })
    }

    /// How long the source has been silent about what it was asked.
    pub(crate) fn busy_for(&self) -> Option<Duration> {
        self.shared.lock().since.map(|since| since.elapsed())
    }

    /// All own pages are in the image: lets the source go, with its thread.
    pub(crate) fn finish(&self) {
        for want in self.shared.end() {
            want.waiter.arrived(&want.range);
        }
    }

    /// Nothing comes to `image` any more: tells everybody why.
    pub(crate) fn give_up(&self, image: &MemoryImage, why: &SourceError) {
        for want in self.shared.end() {
            want.tell(image, why);
        }
    }
}

impl Drop for Fetcher {
    /// With its image; nobody waits then.
    fn drop(&mut self) {
        drop(self.shared.end());
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing that can panic runs under this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the service; returns what was not served.
    fn end(&self) -> Vec<Want> {
        let mut state = self.lock();
        state.over = true;
        state.since = None;
        let mut left = std::mem::take(&mut state.in_hand);
        left.extend(state.queues.iter_mut().flat_map(std::mem::take));
        drop(state);
        self.wanted.notify_all();
        left
    }

    fn serve(&self, image: &Weak<MemoryImage>, source: &dyn PageSource) {
        while let Some((ranges, cause)) = self.take() {
            let Some(image) = image.upgrade() else { return };
            if cause == Cause::Fault {
                source.hint(
                    &ranges
                        .iter()
                        .map(|range| after(range, image.len()))
                        .collect::<Vec<_>>(),
                );
            }
            let result = self.fetch(&image, source, &ranges, cause);
            let mut state = self.lock();
            state.since = None;
            let done = std::mem::take(&mut state.in_hand);
            if ranges.len() > 1 && matches!(&result, Err(why) if !why.is_final()) {
                let again = done.into_iter().map(|want| Want {
                    alone: true,
                    ..want
                });
                state.queues[urgency(cause)].extend(again);
                continue;
            }
            drop(state);
            for want in &done {
                match &result {
                    Ok(()) if image.has(&want.range) => want.waiter.arrived(&want.range),
                    Ok(()) => want.waiter.lost(&SourceError::Damaged {
                        name: source.name(),
                        offset: want.range.start,
                        why: "it was asked for and not delivered".into(),
                    }),
                    Err(why) => want.tell(&image, why),
                }
            }
            if let Err(why) = result
                && why.is_final()
            {
                image.give_up(why);
                return;
            }
        }
    }

    /// One call of the source, for what has not come meanwhile.
    fn fetch(
        &self,
        image: &MemoryImage,
        source: &dyn PageSource,
        ranges: &[Range<u64>],
        cause: Cause,
    ) -> Result<(), SourceError> {
        let missing: Vec<Range<u64>> = ranges
            .iter()
            .filter(|range| !image.has(range))
            .cloned()
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        let name = source.name();
        let mut sink = Heard {
            sink: ImageSink {
                image,
                source: &name,
                cause,
            },
            shared: self,
        };
        let fetched = catch_unwind(AssertUnwindSafe(|| source.fetch(&missing, &mut sink)));
        fetched.unwrap_or_else(|_panic| {
            Err(SourceError::Gone {
                name,
                why: "it panicked".into(),
            })
        })
    }

    /// The source has just delivered something that it was asked for, or more.
    fn heard(&self) {
        if let Some(since) = &mut self.lock().since {
            *since = Instant::now();
        }
    }

    /// Waits for something to be wanted and takes it in hand. `None` at the end.
    fn take(&self) -> Option<(Vec<Range<u64>>, Cause)> {
        let mut state = self.lock();
        loop {
            if state.over {
                return None;
            }
            if let Some(queue) = state.queues.iter_mut().find(|queue| !queue.is_empty()) {
                let together = queue.iter().take(BATCH).take_while(|want| !want.alone);
                let batch = together.count().max(1);
                let wants: Vec<Want> = queue.drain(..batch).collect();
                let ranges = wants.iter().map(|want| want.range.clone()).collect();
                let cause = wants[0].cause;
                state.in_hand = wants;
                state.since = Some(Instant::now());
                return Some((ranges, cause));
            }
            state = self
                .wanted
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Which queue it waits in.
fn urgency(cause: Cause) -> usize {
    match cause {
        Cause::Fault | Cause::ParentWrite => 0,
        Cause::Prefetch => 1,
        Cause::Background => 2,
    }
}

/// What a clone that touches `range` of an image of `len` bytes may touch next.
fn after(range: &Range<u64>, len: u64) -> Range<u64> {
    range.end..(range.end + AHEAD).min(len)
}

/// Passes on what a source delivers, and notes that it was not silent.
struct Heard<'a> {
    sink: ImageSink<'a>,
    shared: &'a Shared,
}

impl Heard<'_> {
    /// Only what was still missing counts: a source could repeat itself for ever.
    fn hear(
        &mut self,
        deliver: impl FnOnce(&mut ImageSink<'_>) -> Result<(), SourceError>,
    ) -> Result<(), SourceError> {
        let left = self.sink.image.own_left();
        let delivered = deliver(&mut self.sink);
        if self.sink.image.own_left() < left {
            self.shared.heard();
        }
        delivered
    }
}

impl PageSink for Heard<'_> {
    fn pages(&mut self, offset: u64, content: &[u8]) -> Result<(), SourceError> {
        self.hear(|sink| sink.pages(offset, content))
    }

    fn zero(&mut self, range: Range<u64>) -> Result<(), SourceError> {
        self.hear(|sink| sink.zero(range))
    }

    fn there(&mut self, range: Range<u64>) -> Result<(), SourceError> {
        self.hear(|sink| sink.there(range))
    }
}

/// A thread that waits itself.
#[derive(Default)]
pub(crate) struct Arrival {
    come: Mutex<Option<Result<(), SourceError>>>,
    changed: Condvar,
}

impl Arrival {
    /// Waits for the pages or for the news that they will not come.
    pub(crate) fn wait(&self) -> Result<(), SourceError> {
        let mut come = self.come.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(come) = come.take() {
                return come;
            }
            come = self
                .changed
                .wait(come)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn set(&self, result: Result<(), SourceError>) {
        *self.come.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
        self.changed.notify_all();
    }
}

impl Waiter for Arrival {
    fn arrived(&self, _range: &Range<u64>) {
        self.set(Ok(()));
    }

    fn lost(&self, why: &SourceError) {
        self.set(Err(why.clone()));
    }
}
