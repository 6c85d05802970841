//! One bit a page, set once, by any thread.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use forkvm_vmm::memory::PAGE;

/// See the module's text. Offsets are file offsets of RAM in bytes, multiples of [`PAGE`].
#[derive(Debug)]
pub(super) struct PageBitmap {
    words: Vec<AtomicU64>,
}

impl PageBitmap {
    /// No bit set, for `len` bytes.
    pub(super) fn new(len: u64) -> PageBitmap {
        let words = len.div_ceil(PAGE).div_ceil(64) as usize;
        PageBitmap {
            words: (0..words).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// Whether the page at `offset` is set.
    pub(super) fn has(&self, offset: u64) -> bool {
        let page = offset / PAGE;
        self.words[(page / 64) as usize].load(Ordering::Acquire) >> (page % 64) & 1 == 1
    }

    /// Sets the pages of `range`. Returns how many were not set before.
    pub(super) fn set(&self, range: &Range<u64>) -> u64 {
        let (mut page, end) = (range.start / PAGE, range.end / PAGE);
        let mut new = 0;
        while page < end {
            let (word, bit) = (page / 64, page % 64);
            let count = (end - page).min(64 - bit);
            let mask = (u64::MAX >> (64 - count)) << bit;
            let before = self.words[word as usize].fetch_or(mask, Ordering::AcqRel);
            new += u64::from((mask & !before).count_ones());
            page += count;
        }
        new
    }

    /// The pages of `range` that are not set, as ranges.
    pub(super) fn missing(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let mut at = range.start;
        std::iter::from_fn(move || {
            while at < range.end && self.has(at) {
                at += PAGE;
            }
            let start = at;
            while at < range.end && !self.has(at) {
                at += PAGE;
            }
            (start < at).then_some(start..at)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_pages_are_those_that_nobody_set() {
        let bitmap = PageBitmap::new(200 * PAGE);
        assert_eq!(bitmap.set(&(3 * PAGE..70 * PAGE)), 67);
        assert_eq!(bitmap.set(&(60 * PAGE..70 * PAGE)), 0);
        assert_eq!(bitmap.set(&(128 * PAGE..129 * PAGE)), 1);
        let missing: Vec<_> = bitmap.missing(0..200 * PAGE).collect();
        assert_eq!(
            missing,
            [0..3 * PAGE, 70 * PAGE..128 * PAGE, 129 * PAGE..200 * PAGE]
        );
        assert!(bitmap.has(69 * PAGE) && !bitmap.has(70 * PAGE));
    }
}
