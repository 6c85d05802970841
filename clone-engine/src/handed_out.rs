//! What other processes have of something of this one, and that it is forgotten there when it goes here.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// Part of a fork point or a family, which others name by its number.
pub(crate) struct HandedOut {
    /// Tells its owner from every other one of this process.
    number: u64,
    /// What ends there with the owner.
    kept: Mutex<Vec<Box<dyn Send + Sync>>>,
}

impl Default for HandedOut {
    fn default() -> HandedOut {
        static NUMBERS: AtomicU64 = AtomicU64::new(0);
        HandedOut {
            number: NUMBERS.fetch_add(1, Ordering::Relaxed),
            kept: Mutex::default(),
        }
    }
}

impl HandedOut {
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// Drops `thing` with the owner.
    pub(crate) fn keep(&self, thing: Box<dyn Send + Sync>) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.push(thing);
    }
}
