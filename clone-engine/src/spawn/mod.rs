//! Where clones come to life.
//!
//! A [`Spawner`] makes clones out of a fork point. All clones of a request are prepared, up to where only
//! their start is missing, before the first one runs, so that a request that cannot be met has no effect. [`in_process`] makes them VMs of this process; [`process`] hands them to
//! workers, processes of their own that it has started ahead of time.

pub mod in_process;
pub mod process;

use std::io;
use std::sync::Arc;
use std::time::Instant;

use forkvm_devices::{DeviceError, SectionError};
use forkvm_vmm::{MachineState, MemoryError, VmConfig, VmError};
use thiserror::Error;

use crate::descriptor::DescriptorError;
use crate::family::{Ending, Family};
use crate::fork::ForkError;
use crate::fork_point::ForkPoint;
use crate::member::Member;
use crate::phase::Vetoed;
use crate::pool::PoolError;
use crate::userfault::UserfaultError;

pub use crate::wire::Refusal;
use process::WorkerError;

/// Makes clones.
pub trait Spawner: Send + Sync {
    /// The word in options and outputs.
    fn name(&self) -> &'static str;

    /// Whether clones can be made at all. Asked before a fork does anything.
    fn check(&self) -> Result<(), SpawnError> {
        Ok(())
    }

    /// Whether clones live in other processes than this one.
    fn apart(&self) -> bool {
        false
    }

    /// Has `count` shells ready for clones of the shape of `state`, where those of `family` would live,
    /// and says how many there are then.
    fn fill(
        &self,
        family: &Family,
        state: &Arc<MachineState>,
        count: u32,
    ) -> Result<u32, SpawnError> {
        Ok(family.pool().fill(state, count)?)
    }

    /// Shells that wait where clones of `family` would live, for machines with as much RAM and as many vCPUs
    /// as `config` says: what those take is taken already.
    fn shells(&self, family: &Family, config: &VmConfig) -> u32 {
        family.pool().ready(config)
    }

    /// Processes beside this one that clones live in, by their ids.
    fn processes(&self) -> Vec<u32> {
        Vec::new()
    }

    /// A fork point was made that nobody spawns from now. An error undoes it.
    fn publish(&self, _point: &Arc<ForkPoint>) -> Result<(), ForkError> {
        Ok(())
    }

    /// Spawns `count` clones of `point`, for which there is room: all of them run, or none. `asked` is
    /// when they were asked for.
    fn spawn(
        &self,
        point: &Arc<ForkPoint>,
        count: u32,
        asked: Instant,
    ) -> Result<Vec<Arc<Member>>, ForkError>;
}

/// A clone that waits for its start.
pub trait Prepared {
    /// Lets it run.
    fn start(self: Box<Self>) -> Result<Arc<Member>, SpawnError>;
}

/// Why a clone could not be made.
#[derive(Debug, Error)]
pub enum SpawnError {
    /// It got no shell.
    #[error("building a shell for the clone failed")]
    Shell(#[from] PoolError),
    /// Its memory could not be mapped.
    #[error("mapping the clone's memory failed")]
    Memory(#[from] MemoryError),
    /// Its page faults cannot be served.
    #[error("watching the clone's memory failed")]
    Userfault(#[from] UserfaultError),
    /// Its VM could not be restored or started.
    #[error("restoring or starting the clone's VM failed")]
    Vm(#[from] VmError),
    /// Its doorbell page could not be written.
    #[error("telling the clone who it is failed")]
    Identity(#[from] DeviceError),
    /// The state of the fork point has a section that nobody reads.
    #[error(transparent)]
    Section(#[from] SectionError),
    /// Random bytes, a console or a thread could not be had.
    #[error("the host refused {what}")]
    Host {
        /// What was asked.
        what: &'static str,
        /// What it said.
        #[source]
        source: io::Error,
    },
    /// The fork point cannot be handed to a worker.
    #[error("handing the fork point to another process failed")]
    Descriptor(#[from] DescriptorError),
    /// No worker could be had, or one died.
    #[error(transparent)]
    Worker(#[from] WorkerError),
    /// A worker tried and failed.
    #[error("worker {pid} could not prepare the clone: {why}")]
    InWorker {
        /// Its process.
        pid: u32,
        /// What went wrong there.
        why: String,
    },
    /// The engine, which spawns for its workers, did not.
    #[error("{}", .0.why)]
    Refused(Refusal),
    /// Its family is being ended.
    #[error(transparent)]
    Ending(#[from] Ending),
    /// An observer stopped it.
    #[error(transparent)]
    Vetoed(#[from] Vetoed),
}
