//! How the engine is set up while it is measured: the first parts of a case's name.

use std::env;
use std::sync::Arc;

use forkvm_clone_engine::spawn::in_process::InProcess;
use forkvm_clone_engine::spawn::process::{Process, ProcessConfig, WorkerProgram};
use forkvm_clone_engine::spawn::{SpawnError, Spawner};
use forkvm_clone_engine::{FamilyConfig, FaultConfig, Observer, WorkingSetPolicy};

use super::measure::{BenchError, call};
use crate::Vm;

/// Where the VM of a clone comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pool {
    /// It waits in the pool, filled before the clock runs.
    Pooled,
    /// It is built when the clone is asked for.
    Unpooled,
}

/// Every way.
pub const POOLS: &[Pool] = &[Pool::Pooled, Pool::Unpooled];

impl Pool {
    /// The word in the names of cases.
    pub fn as_str(self) -> &'static str {
        match self {
            Pool::Pooled => "pooled",
            Pool::Unpooled => "unpooled",
        }
    }

    /// Has shells ready for `count` clones of `vm`, where that is the way. Nobody's clock runs.
    pub fn fill(self, vm: &Vm, count: u32) -> Result<(), BenchError> {
        match self {
            Pool::Pooled => vm
                .fill_pool(count)
                .map(|_ready| ())
                .map_err(BenchError::from),
            Pool::Unpooled => Ok(()),
        }
    }
}

/// Where a clone runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the process of its parent.
    InProcess,
    /// In a worker, a process that was started before.
    Process,
}

/// Every place.
pub const PLACES: &[Place] = &[Place::InProcess, Place::Process];

impl Place {
    /// The word in the names of cases.
    pub fn as_str(self) -> &'static str {
        match self {
            Place::InProcess => "in-process",
            Place::Process => "process",
        }
    }

    /// Starts workers where clones live in some: this program, which the command makes one of.
    fn spawner(self) -> Result<Arc<dyn Spawner>, BenchError> {
        Ok(match self {
            Place::InProcess => Arc::new(InProcess),
            Place::Process => {
                let path = env::current_exe().map_err(call("finding this program"))?;
                let args = vec!["worker".into()];
                let workers = ProcessConfig::new(WorkerProgram { path, args });
                Arc::new(Process::start(workers).map_err(SpawnError::from)?)
            }
        })
    }
}

/// Both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setting {
    /// Where a VM comes from.
    pub pool: Pool,
    /// Where it runs.
    pub place: Place,
}

impl Setting {
    /// What every host can do.
    pub const PLAIN: Setting = Setting {
        pool: Pool::Unpooled,
        place: Place::InProcess,
    };

    /// A family that is set up like that. Nothing comes into its images but what is touched and, if
    /// `working_set` says so, what earlier clones touched, so that one repetition does not work while
    /// another is measured; `chunk` bytes come together, the engine's default with `None`.
    pub fn family(
        self,
        observer: Arc<dyn Observer>,
        chunk: Option<u64>,
        working_set: WorkingSetPolicy,
    ) -> Result<FamilyConfig, BenchError> {
        let usual = FaultConfig::default();
        Ok(FamilyConfig {
            observer,
            spawner: self.place.spawner()?,
            faults: FaultConfig {
                background: None,
                chunk: chunk.unwrap_or(usual.chunk),
                working_set,
                ..usual
            },
            ..FamilyConfig::default()
        })
    }
}
