//! Sources that do as a test says, page by page, and change their manners while guests run.

use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;

use forkvm::engine::source::{PageSink, PageSource, SourceError, Sources};
use vm_memory::VolatileSlice;

use super::LONG;

/// How a source answers for some pages.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Manner {
    /// As the source that it stands before.
    Near,
    /// The same, but by way of a thread of its own.
    Far,
    /// Not until its manners change, and then by those.
    Stall,
    /// By an error that concerns these pages.
    Fail,
    /// By an error that is its end.
    Gone,
    /// By calling it done.
    Nothing,
    /// By part of a page.
    Short,
    /// By a panic, so many times, of the thread that answers faults, or workers that ask for pages.
    Panic(u32),
}

/// What all sources of a family answer; `Near` at first.
#[derive(Clone)]
pub(crate) struct Switch(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// For file offsets of RAM; all others are for `elsewhere`.
    pages: Range<u64>,
    manner: Manner,
    elsewhere: Manner,
    /// Calls that stall now.
    stalled: u32,
}

impl Switch {
    pub(crate) fn new() -> Switch {
        Switch(Arc::new(Shared {
            state: Mutex::new(State {
                pages: 0..0,
                manner: Manner::Near,
                elsewhere: Manner::Near,
                stalled: 0,
            }),
            changed: Condvar::new(),
        }))
    }

    /// From now on `pages`, file offsets of RAM, are answered by `manner`, all others as they are.
    pub(crate) fn set(&self, pages: Range<u64>, manner: Manner) {
        let mut state = self.0.lock();
        (state.pages, state.manner) = (pages, manner);
        drop(state);
        self.0.changed.notify_all();
    }

    /// All pages are answered by `manner`.
    pub(crate) fn set_all(&self, manner: Manner) {
        self.0.lock().elsewhere = manner;
        self.set(0..0, Manner::Near);
    }

    /// Waits until a call stalls.
    pub(crate) fn wait_stalled(&self) {
        let stalled = |state: &mut State| state.stalled == 0;
        let waited = self
            .0
            .changed
            .wait_timeout_while(self.0.lock(), LONG, stalled);
        assert!(!waited.unwrap().1.timed_out(), "nobody asked for the pages");
    }

    /// Whether all panics have happened.
    pub(crate) fn panics_left(&self) -> u32 {
        match self.0.lock().manner {
            Manner::Panic(left) => left,
            _ => 0,
        }
    }
}

impl Sources for Switch {
    fn of_image(&self, source: Arc<dyn PageSource>) -> Arc<dyn PageSource> {
        let switch = self.0.clone();
        Arc::new(Switched { switch, source })
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn manner(&self, range: &Range<u64>) -> Manner {
        self.lock().manner(range)
    }

    fn stall(&self, range: &Range<u64>) {
        let mut state = self.lock();
        state.stalled += 1;
        self.changed.notify_all();
        while state.manner(range) == Manner::Stall {
            state = self.changed.wait(state).unwrap();
        }
        state.stalled -= 1;
    }

    /// Whether the caller is to panic.
    fn panics(&self) -> bool {
        let answers_faults = thread::current()
            .name()
            .is_some_and(|name| name.starts_with("fault") || name == "pages");
        match &mut self.lock().manner {
            Manner::Panic(left) if answers_faults && *left > 0 => {
                *left -= 1;
                true
            }
            _ => false,
        }
    }
}

impl State {
    fn manner(&self, range: &Range<u64>) -> Manner {
        if range.start < self.pages.end && self.pages.start < range.end {
            self.manner
        } else {
            self.elsewhere
        }
    }
}

struct Switched {
    switch: Arc<Shared>,
    source: Arc<dyn PageSource>,
}

impl Switched {
    fn fetch_one(&self, range: &Range<u64>, sink: &mut dyn PageSink) -> Result<(), SourceError> {
        let (name, why) = (self.name(), "as the test says".to_owned());
        let offset = range.start;
        match self.switch.manner(range) {
            Manner::Stall => {
                self.switch.stall(range);
                self.fetch_one(range, sink)
            }
            Manner::Fail => Err(SourceError::Damaged { name, offset, why }),
            Manner::Gone => Err(SourceError::Gone { name, why }),
            Manner::Nothing => Ok(()),
            Manner::Short => sink.pages(offset, &[0xee; 100]),
            Manner::Near | Manner::Far | Manner::Panic(_) => {
                self.source.fetch(std::slice::from_ref(range), sink)
            }
        }
    }
}

impl PageSource for Switched {
    fn name(&self) -> String {
        self.source.name()
    }

    fn fetch(&self, ranges: &[Range<u64>], sink: &mut dyn PageSink) -> Result<(), SourceError> {
        ranges
            .iter()
            .try_for_each(|range| self.fetch_one(range, sink))
    }

    fn local(&self, range: &Range<u64>, show: &mut dyn FnMut(VolatileSlice<'_>)) -> bool {
        match self.switch.manner(range) {
            Manner::Near => self.source.local(range, show),
            Manner::Panic(_) => {
                assert!(!self.switch.panics(), "as the test says");
                self.source.local(range, show)
            }
            _ => false,
        }
    }

    fn hint(&self, ranges: &[Range<u64>]) {
        self.source.hint(ranges);
    }
}
