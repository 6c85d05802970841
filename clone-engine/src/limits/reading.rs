//! What the host had left when it was last asked, and what was promised to clones since.
//!
//! Asking means a dozen small files (docs/accounting.md says what they cost). A reading serves for a moment ([`FRESH`]), as long as
//! what was promised since takes no more than half of what was left then, so close to a limit every
//! request asks again. Within that moment others may take something too; so they may between any
//! check and the clones that it was made for. Mappings are counted apart and longer (`mappings.rs`).

use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::{Limit, descriptors, memory, threads};

/// How long a reading serves.
const FRESH: Duration = Duration::from_millis(100);

/// Of each, what is left or what is wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Amounts {
    pub(super) kib: u64,
    pub(super) descriptors: u64,
    pub(super) threads: u64,
}

impl Amounts {
    fn plus(self, more: Amounts) -> Amounts {
        Amounts {
            kib: self.kib.saturating_add(more.kib),
            descriptors: self.descriptors.saturating_add(more.descriptors),
            threads: self.threads.saturating_add(more.threads),
        }
    }

    fn less(self, taken: Amounts) -> Amounts {
        Amounts {
            kib: self.kib.saturating_sub(taken.kib),
            descriptors: self.descriptors.saturating_sub(taken.descriptors),
            threads: self.threads.saturating_sub(taken.threads),
        }
    }

    fn is_within_half_of(self, left: Amounts) -> bool {
        self.kib <= left.kib / 2
            && self.descriptors <= left.descriptors / 2
            && self.threads <= left.threads / 2
    }
}

/// What is left, and what it is that bounds it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Left {
    pub(super) amounts: Amounts,
    pub(super) memory: Limit,
    pub(super) threads: Limit,
}

struct Reading {
    at: Instant,
    left: Left,
    promised: Amounts,
}

impl Reading {
    /// What is left now, if that is known well enough to promise `wanted` more.
    fn left(&self, wanted: Amounts, now: Instant) -> Option<Left> {
        let fresh = now.saturating_duration_since(self.at) < FRESH;
        let enough = self
            .promised
            .plus(wanted)
            .is_within_half_of(self.left.amounts);
        (fresh && enough).then(|| Left {
            amounts: self.left.amounts.less(self.promised),
            ..self.left
        })
    }
}

/// `None` until it is read for the first time.
static LAST: Mutex<Option<Reading>> = Mutex::new(None);

/// What is left, exact where that is less than twice what is `wanted`.
pub(super) fn left(wanted: Amounts) -> io::Result<Left> {
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    let now = Instant::now();
    if let Some(left) = last.as_ref().and_then(|known| known.left(wanted, now)) {
        return Ok(left);
    }
    let (kib, memory) = memory::left_kib()?;
    let (threads, of_whom) = threads::left(wanted.threads)?;
    let left = Left {
        amounts: Amounts {
            kib,
            descriptors: descriptors::left()?,
            threads,
        },
        memory,
        threads: of_whom,
    };
    *last = Some(Reading {
        at: now,
        left,
        promised: Amounts::default(),
    });
    Ok(left)
}

/// Clones that were granted will take so much.
pub(super) fn promise(amounts: Amounts) {
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(reading) = &mut *last {
        reading.promised = reading.promised.plus(amounts);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn amounts(each: u64) -> Amounts {
        Amounts {
            kib: each,
            descriptors: each,
            threads: each,
        }
    }

    fn reading(left: u64, promised: u64) -> Reading {
        Reading {
            at: Instant::now(),
            left: Left {
                amounts: amounts(left),
                memory: Limit::Memory,
                threads: Limit::ThreadsOfHost,
            },
            promised: amounts(promised),
        }
    }

    #[test]
    fn half_of_what_was_left_is_promised_without_asking_again() {
        let left = |left, promised, wanted| {
            let reading = reading(left, promised);
            let known = reading.left(amounts(wanted), reading.at);
            known.map(|left| left.amounts)
        };
        assert_eq!(left(1000, 0, 500), Some(amounts(1000)));
        assert_eq!(left(1000, 400, 100), Some(amounts(600)));
        assert_eq!(left(1000, 400, 101), None);
        assert_eq!(left(0, 0, 1), None);
    }

    #[test]
    fn one_thing_that_runs_out_is_enough_to_ask_again() {
        let reading = reading(1000, 0);
        let much = Amounts {
            threads: 501,
            ..Amounts::default()
        };
        assert!(reading.left(much, reading.at).is_none());
    }

    #[test]
    fn a_reading_serves_for_a_moment_only() {
        let reading = reading(1000, 0);
        assert!(reading.left(amounts(1), reading.at + FRESH / 2).is_some());
        assert!(reading.left(amounts(1), reading.at + FRESH).is_none());
    }
}
