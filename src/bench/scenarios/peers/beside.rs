//! Starts of a peer, and of clones beside it: times and, pair by pair, their ratios.

use std::time::Duration;

use crate::bench::measure::{BenchError, Case, Experiment, Repetitions, Samples, Unit};
use crate::bench::setting::{POOLS, Pool};

use super::Peer;
use super::ours::Ours;

/// See the module's text.
pub(super) struct Beside {
    pub(super) peer: Box<dyn Peer>,
    pub(super) ours: Ours,
    pub(super) measured: u32,
    /// Repetitions that are behind.
    pub(super) done: u32,
}

impl Beside {
    fn clones(&self) -> Result<Vec<(Pool, Duration)>, BenchError> {
        let start = |&pool: &Pool| Ok((pool, self.ours.start(pool)?));
        POOLS.iter().map(start).collect()
    }
}

impl Experiment for Beside {
    fn name(&self) -> String {
        self.peer.name().into()
    }

    fn repetitions(&self) -> Repetitions {
        Repetitions {
            warm_up: 1,
            measured: self.measured,
        }
    }

    fn prepare(&mut self) -> Result<(), BenchError> {
        self.ours.prepare()?;
        self.peer.prepare()
    }

    fn repeat(&mut self, samples: &mut Samples) -> Result<(), BenchError> {
        self.done += 1;
        // In turns: whoever comes second finds the caches as the other one has left them.
        let (took, clones) = if self.done.is_multiple_of(2) {
            let clones = self.clones()?;
            (self.peer.start()?, clones)
        } else {
            (self.peer.start()?, self.clones()?)
        };
        let name = self.name();
        let version = |case: &mut Case| {
            if let Some(version) = self.peer.version() {
                case.version(version);
            }
        };
        version(samples.time(&name, Unit::Us, took));
        for (pool, ours) in clones {
            let ratio = took.as_secs_f64() / ours.as_secs_f64();
            let case = format!("{name}/over-{}", pool.as_str());
            let case = samples.value(&case, Unit::Ratio, ratio);
            version(case.column("forkvm_us", ours.as_secs_f64() * 1e6));
        }
        Ok(())
    }
}
