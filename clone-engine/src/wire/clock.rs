//! Instants that cross from one process of a host to another.
//!
//! `std::time::Instant` is CLOCK_MONOTONIC here, which all processes of a host share, but it does not
//! say its value. So each process looks at both once, and converts by the difference from there: exact
//! but for the time that the look took, well below a microsecond.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// Looks at both clocks, of which the quickest counts.
const LOOKS: usize = 8;

/// Nanoseconds of CLOCK_MONOTONIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HostTime(i64);

#[derive(Clone, Copy)]
struct Anchor {
    instant: Instant,
    host: i64,
}

impl From<Instant> for HostTime {
    fn from(instant: Instant) -> HostTime {
        let anchor = anchor();
        HostTime(if instant >= anchor.instant {
            anchor.host + nanoseconds(instant - anchor.instant)
        } else {
            anchor.host - nanoseconds(anchor.instant - instant)
        })
    }
}

impl From<HostTime> for Instant {
    fn from(time: HostTime) -> Instant {
        let anchor = anchor();
        let apart = Duration::from_nanos(time.0.abs_diff(anchor.host));
        let instant = if time.0 >= anchor.host {
            anchor.instant.checked_add(apart)
        } else {
            anchor.instant.checked_sub(apart)
        };
        // A time that no clock of this host can have shown is as good as the anchor.
        instant.unwrap_or(anchor.instant)
    }
}

fn anchor() -> Anchor {
    static ANCHOR: OnceLock<Anchor> = OnceLock::new();
    *ANCHOR.get_or_init(|| {
        let look = |_| {
            let before = Instant::now();
            let host = clock_gettime(ClockId::Monotonic);
            let took = before.elapsed();
            let host = host.tv_sec * 1_000_000_000 + host.tv_nsec;
            let anchor = Anchor {
                instant: before + took / 2,
                host,
            };
            (took, anchor)
        };
        let quickest = (0..LOOKS).map(look).min_by_key(|(took, _)| *took);
        quickest.expect("it looked").1
    })
}

fn nanoseconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instant_comes_back_as_it_went() {
        let now = Instant::now();
        for instant in [
            now,
            now + Duration::from_secs(5),
            now - Duration::from_millis(5),
        ] {
            assert_eq!(Instant::from(HostTime::from(instant)), instant);
        }
    }

    #[test]
    fn it_is_the_clock_of_the_host() {
        let host = clock_gettime(ClockId::Monotonic);
        let host = host.tv_sec * 1_000_000_000 + host.tv_nsec;
        let HostTime(here) = Instant::now().into();
        assert!(here.abs_diff(host) < 1_000_000_000, "{here} {host}");
    }
}
