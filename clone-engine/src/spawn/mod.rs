//! Where clones come to life.
//!
//! A [`Spawner`] makes one clone out of a fork point, up to the point where only its start is
//! missing: all clones of a request are prepared before the first one runs, so that a request that
//! cannot be met has no effect. The only spawner here is [`in_process`].

pub mod in_process;

use std::io;
use std::sync::Arc;

use forkvm_devices::{DeviceError, SectionError};
use forkvm_vmm::{MemoryError, VmError};
use thiserror::Error;

use crate::family::{Ending, Family};
use crate::fork_point::ForkPoint;
use crate::identity::Identity;
use crate::member::Member;
use crate::phase::{Observer, Vetoed};
use crate::pool::PoolError;
use crate::userfault::UserfaultError;

/// Makes clones.
pub trait Spawner: Send + Sync {
    /// The word in options and outputs.
    fn name(&self) -> &'static str;

    /// Prepares the clone `identity` of `point`. What was built goes when the result is dropped.
    fn prepare(
        &self,
        family: &Arc<Family>,
        point: &ForkPoint,
        identity: Identity,
        granted: u32,
        observer: &dyn Observer,
    ) -> Result<Box<dyn Prepared>, SpawnError>;
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
    /// Its family is being ended.
    #[error(transparent)]
    Ending(#[from] Ending),
    /// An observer stopped it.
    #[error(transparent)]
    Vetoed(#[from] Vetoed),
}
