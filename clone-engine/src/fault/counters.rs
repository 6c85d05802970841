//! What the fault handler of a family has done.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use hdrhistogram::Histogram;

/// Why a page entered an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    /// A clone touched it, or one of its chunk.
    Fault,
    /// It was expected to be touched.
    Prefetch,
    /// The copier came by, or whoever completes an image.
    Background,
    /// The parent was about to write it.
    ParentWrite,
}

/// Counted while it runs; [`FaultCounters::figures`] reads it.
#[derive(Debug)]
pub(crate) struct FaultCounters {
    pages: [AtomicU64; 4],
    zero_pages: AtomicU64,
    /// Nanoseconds from the fault's message to its answer, of faults that brought pages.
    fetch: Mutex<Histogram<u64>>,
}

/// What came into the images of a family after their publication, and how long that took.
#[derive(Clone)]
pub struct FaultFigures {
    /// Pages that clones fetched by touching them or one next to them.
    pub pages_by_fault: u64,
    /// Pages fetched before their first touch.
    pub pages_by_prefetch: u64,
    /// Pages copied in the background.
    pub pages_by_background: u64,
    /// Pages copied because their VM was about to write them.
    pub pages_by_parent_write: u64,
    /// Faults that were answered with zero pages.
    pub zero_faults: u64,
    /// Nanoseconds to serve a fault that brought pages.
    pub fetch_ns: Histogram<u64>,
}

impl FaultCounters {
    pub(crate) fn new() -> FaultCounters {
        FaultCounters {
            pages: Default::default(),
            zero_pages: AtomicU64::new(0),
            fetch: Mutex::new(Histogram::new(3).expect("3 digits are in its range")),
        }
    }

    pub(crate) fn count(&self, cause: Cause, pages: u64) {
        self.pages[cause as usize].fetch_add(pages, Ordering::Relaxed);
    }

    pub(crate) fn count_zero(&self) {
        self.zero_pages.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn took(&self, took: Duration) {
        let mut fetch = self.fetch.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = fetch.record(took.as_nanos() as u64) {
            tracing::debug!(%error, "a fault took longer than can be recorded");
        }
    }

    pub(crate) fn figures(&self) -> FaultFigures {
        let pages = |cause: Cause| self.pages[cause as usize].load(Ordering::Relaxed);
        FaultFigures {
            pages_by_fault: pages(Cause::Fault),
            pages_by_prefetch: pages(Cause::Prefetch),
            pages_by_background: pages(Cause::Background),
            pages_by_parent_write: pages(Cause::ParentWrite),
            zero_faults: self.zero_pages.load(Ordering::Relaxed),
            fetch_ns: self
                .fetch
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone(),
        }
    }
}

impl fmt::Debug for FaultFigures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultFigures")
            .field("pages_by_fault", &self.pages_by_fault)
            .field("pages_by_prefetch", &self.pages_by_prefetch)
            .field("pages_by_background", &self.pages_by_background)
            .field("pages_by_parent_write", &self.pages_by_parent_write)
            .field("zero_faults", &self.zero_faults)
            .field("fetches", &self.fetch_ns.len())
            .finish()
    }
}
