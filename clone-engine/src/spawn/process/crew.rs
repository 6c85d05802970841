//! The workers of a spawner: how many there are, and which one runs a clone.

use std::sync::{Arc, Mutex, PoisonError};

use forkvm_vmm::VmConfig;

use super::link::{Berth, Worker};
use super::{ProcessConfig, WorkerError};
use crate::family::Family;

/// See the module's text.
pub(super) struct Crew {
    config: ProcessConfig,
    workers: Mutex<Vec<Arc<Worker>>>,
}

impl Crew {
    /// Without a worker.
    pub(super) fn new(config: ProcessConfig) -> Crew {
        Crew {
            config,
            workers: Mutex::default(),
        }
    }

    /// A place for each of `clones` more, each in the worker that has the fewest then. Workers that died
    /// are replaced; others are added while the share of each would be more than it is to have.
    pub(super) fn assign(&self, clones: usize) -> Result<Vec<Berth>, WorkerError> {
        let mut workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
        workers.retain(|worker| worker.is_alive());
        let taken: usize = workers.iter().map(|worker| worker.berths()).sum();
        let share = self.config.clones_per_worker.max(1) as usize;
        let needed = (taken + clones)
            .div_ceil(share)
            .max(self.config.ready)
            .max(1);
        // All are executed before any is waited for.
        let started = (workers.len()..needed).map(|_| Worker::start(&self.config));
        let started = started.collect::<Result<Vec<_>, _>>()?;
        for worker in started {
            workers.push(Arc::new(worker.greet()?));
        }
        let berth = |_| {
            let fewest = workers.iter().min_by_key(|worker| worker.berths());
            Berth::in_worker(fewest.expect("one at least was needed"))
        };
        Ok((0..clones).map(berth).collect())
    }

    /// Shells that wait in them for clones of `family` like `config`.
    pub(super) fn shells(&self, family: &Family, config: &VmConfig) -> u32 {
        let workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
        let alive = workers.iter().filter(|worker| worker.is_alive());
        alive
            .map(|worker| worker.link().shells().left(family, config))
            .sum()
    }

    pub(super) fn processes(&self) -> Vec<u32> {
        let workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
        workers.iter().map(|worker| worker.pid()).collect()
    }
}
