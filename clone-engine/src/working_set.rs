//! The working set of a fork point: what its clones touched first, in order (REAP, ASPLOS 2021).
//!
//! Recorded at the faults of the clones, by the range that a fault brought, so what was there before
//! it was touched is not seen. The next fork point of the same parent, whose clones will probably do
//! much the same, is given it in one go ([`crate::fault`]). Only a matter of speed: a set that fits
//! ill costs copies, and what it does not name is fetched when it is touched.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use forkvm_vmm::memory::PAGE;
use roaring::RoaringBitmap;
use serde::{Deserialize, Serialize};

/// Most ranges of one set: 128 MiB of memory in chunks of 64 KiB. What is touched after them is not
/// recorded.
const MOST: usize = 2048;

/// Whether first touches are recorded, and what becomes of the record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum WorkingSetPolicy {
    /// Nothing is recorded.
    Off,
    /// First touches of a fork point's clones are recorded; the parent's next lazy fork point gets
    /// those pages at once.
    #[default]
    RecordAndReplay,
}

/// Ranges of guest RAM in the order of their first touch: file offsets in bytes, multiples of 4096,
/// 2048 of them at most.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkingSet {
    ranges: Vec<Range<u64>>,
}

impl WorkingSet {
    /// In the order of their first touch.
    pub fn ranges(&self) -> &[Range<u64>] {
        &self.ranges
    }

    /// Bytes of memory.
    pub fn len(&self) -> u64 {
        let len = |range: &Range<u64>| range.end - range.start;
        self.ranges.iter().map(len).sum()
    }

    /// Whether nothing was touched.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }
}

/// Takes down what the clones of one fork point touch first. Called by fault threads.
#[derive(Debug, Default)]
pub(crate) struct Recorder {
    touched: Mutex<Touched>,
}

#[derive(Debug, Default)]
struct Touched {
    set: WorkingSet,
    /// Page numbers of what is in the set.
    pages: RoaringBitmap,
}

impl Recorder {
    /// One that knows `set` from an earlier fork point. What was replayed raises no fault any more,
    /// and is not to be forgotten for that.
    pub(crate) fn after(set: &WorkingSet) -> Arc<Recorder> {
        let recorder = Recorder::default();
        set.ranges.iter().for_each(|range| recorder.touched(range));
        Arc::new(recorder)
    }

    /// A fault has brought `range`.
    pub(crate) fn touched(&self, range: &Range<u64>) {
        let pages = (range.start / PAGE) as u32..(range.end / PAGE) as u32;
        let mut touched = self.lock();
        if touched.set.ranges.len() < MOST && touched.pages.insert_range(pages) > 0 {
            touched.set.ranges.push(range.clone());
        }
    }

    /// What was touched so far.
    pub(crate) fn working_set(&self) -> WorkingSet {
        self.lock().set.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Touched> {
        self.touched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(number: u64) -> Range<u64> {
        number * PAGE..(number + 1) * PAGE
    }

    #[test]
    fn touches_are_kept_in_their_order_and_once() {
        let recorder = Recorder::default();
        for number in [7, 3, 7, 9, 3] {
            recorder.touched(&page(number));
        }
        let set = recorder.working_set();
        assert_eq!(set.ranges(), [page(7), page(3), page(9)]);
        assert_eq!(set.len(), 3 * PAGE);
    }

    #[test]
    fn what_was_replayed_is_still_known_at_the_next_fork() {
        let first = Recorder::default();
        for number in [5, 1] {
            first.touched(&page(number));
        }
        let second = Recorder::after(&first.working_set());
        for number in [1, 8] {
            second.touched(&page(number));
        }
        assert_eq!(second.working_set().ranges(), [page(5), page(1), page(8)]);
    }

    #[test]
    fn a_record_is_bounded() {
        let recorder = Recorder::default();
        (0..2 * MOST as u64).for_each(|number| recorder.touched(&page(number)));
        let set = recorder.working_set();
        assert_eq!(set.ranges().len(), MOST);
        assert_eq!(set.ranges()[MOST - 1], page(MOST as u64 - 1));
    }
}
