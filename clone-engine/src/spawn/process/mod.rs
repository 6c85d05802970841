//! Clones in processes of their own.
//!
//! A VM process has threads, so it is never fork()ed: [`Process`] starts *workers* by exec, ahead of
//! time (`crew`), and hands them what clones need by open descriptor over a Unix socket (`link`). A
//! worker runs several clones. A process with hundreds of VMs creates the next one ten times slower,
//! so the clones of a request are spread, and workers are added when all have their share.
//!
//! Clones in workers are [`Member`]s like others, whose handles lead to the socket
//! (`resident`); what they fork is spawned here (`forks`). What a worker is, and when it ends, is [`crate::worker`]'s; what is said is `crate::wire`'s.
//! Who holds what is in `docs/processes.md`.

mod crew;
mod forks;
mod last_faults;
mod link;
mod resident;
mod shells;

use std::cell::OnceCell;
use std::collections::HashMap;
use std::ffi::OsString;
use std::io;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Instant;

use forkvm_vmm::{MachineState, VmConfig};
use thiserror::Error;

use super::{Prepared, SpawnError, Spawner};
use crate::descriptor;
use crate::family::Family;
use crate::fork::ForkError;
use crate::fork_point::ForkPoint;
use crate::identity::Identity;
use crate::limits::{self, Need};
use crate::member::Member;
use crate::phase::{Observer, Phase};
use crate::pool::PoolError;
use crate::wire::socket::SocketError;

use crew::Crew;
use link::Link;
use resident::Preparing;

/// The phase that a clone's making begins with.
const FIRST_PHASE: Phase = Phase::Spawn;

/// A program that becomes a worker: it calls [`worker::serve`](crate::worker::serve) with its standard
/// input, which is the engine's socket. Its standard output goes nowhere, its standard error is the
/// engine's.
#[derive(Clone, Debug)]
pub struct WorkerProgram {
    /// The program.
    pub path: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
}

/// How clones are spread over workers.
#[derive(Clone, Debug)]
pub struct ProcessConfig {
    /// What the workers are.
    pub program: WorkerProgram,
    /// Workers that are kept ready, whether or not there are clones; 1 or more.
    pub ready: usize,
    /// Clones that one worker runs before another is started, 1 or more.
    pub clones_per_worker: u32,
}

impl ProcessConfig {
    /// A worker for each CPU, and one more for every 64 clones beyond.
    pub fn new(program: WorkerProgram) -> ProcessConfig {
        ProcessConfig {
            program,
            ready: thread::available_parallelism().map_or(1, NonZeroUsize::get),
            clones_per_worker: 64,
        }
    }
}

/// See the module's text. Dropped, its workers end as soon as their clones have.
pub struct Process {
    crew: Crew,
}

impl Process {
    /// Starts the workers that are to be ready and waits until they are.
    pub fn start(config: ProcessConfig) -> Result<Process, WorkerError> {
        let crew = Crew::new(config);
        crew.assign(0)?;
        Ok(Process { crew })
    }
}

impl Spawner for Process {
    fn name(&self) -> &'static str {
        "process"
    }

    fn check(&self) -> Result<(), SpawnError> {
        // Those that died are replaced now, so that a fork does not fail for want of them later.
        self.crew.assign(0)?;
        Ok(())
    }

    fn apart(&self) -> bool {
        true
    }

    fn fill(
        &self,
        family: &Family,
        state: &Arc<MachineState>,
        count: u32,
    ) -> Result<u32, SpawnError> {
        let config = state.config();
        let waiting = self.crew.shells(family, config);
        if waiting < count {
            // Each worker looks at what bounds it, and all of them at once at what they share.
            let need = Need::of_shells(state, true);
            limits::grant(&need, count - waiting, false).map_err(PoolError::from)?;
        }
        // Where as many clones would go now.
        let mut shares: HashMap<u32, (Arc<Link>, u32)> = HashMap::new();
        for berth in self.crew.assign(count as usize)? {
            let link = berth.worker.link();
            shares
                .entry(link.pid())
                .or_insert_with(|| (link.clone(), 0))
                .1 += 1;
        }
        let file = descriptor::of_state(state)?;
        let mut filling = Vec::new();
        for (link, share) in shares.into_values() {
            let (filled, answer) = channel();
            link.ask_to_fill(family, &file, share, filled)?;
            filling.push((link, answer));
        }
        let wait = |(link, answer): (Arc<Link>, Receiver<Result<u32, String>>)| match answer.recv()
        {
            Ok(Ok(shells)) => {
                link.shells().note(family, config, shells);
                Ok(shells)
            }
            Ok(Err(why)) => Err(SpawnError::InWorker {
                pid: link.pid(),
                why,
            }),
            Err(_died) => Err(link.death().into()),
        };
        filling.into_iter().map(wait).sum()
    }

    fn shells(&self, family: &Family, config: &VmConfig) -> u32 {
        self.crew.shells(family, config)
    }

    fn processes(&self) -> Vec<u32> {
        self.crew.processes()
    }

    fn spawn(
        &self,
        point: &Arc<ForkPoint>,
        count: u32,
        asked: Instant,
    ) -> Result<Vec<Arc<Member>>, ForkError> {
        point.spawn_prepared(count, |identities, observer| {
            self.prepare(point, identities, asked, observer)
        })
    }
}

impl Process {
    fn prepare(
        &self,
        point: &Arc<ForkPoint>,
        identities: Vec<Identity>,
        asked: Instant,
        observer: &dyn Observer,
    ) -> Result<Vec<Box<dyn Prepared>>, SpawnError> {
        let granted = identities.len() as u32;
        let workers = self.crew.assign(identities.len())?;
        let description = OnceCell::new();
        let mut preparing = Vec::with_capacity(identities.len());
        // All are asked for before any is waited for: the workers work at the same time.
        for (identity, berth) in identities.into_iter().zip(workers) {
            point.family.check_open()?;
            observer.enter(FIRST_PHASE, None)?;
            let clone = Preparing::ask(point, &description, identity, granted, asked, berth)?;
            preparing.push(clone);
        }
        let wait = |clone: Preparing| -> Result<Box<dyn Prepared>, SpawnError> {
            Ok(Box::new(clone.wait(observer)?))
        };
        preparing.into_iter().map(wait).collect()
    }
}

/// Why a worker cannot be had, or not any more.
#[derive(Clone, Debug, Error)]
pub enum WorkerError {
    /// It could not be started.
    #[error(
        "starting a worker failed: {program} cannot be executed, or the host has no room for another \
         process: {why}"
    )]
    Start {
        /// The program.
        program: String,
        /// What the host said.
        why: String,
    },
    /// It was started and did not become a worker.
    #[error(
        "{program}, started as a worker, did not become one: {why}; it must call `worker::serve` with \
         its standard input, and be of the same build as its engine"
    )]
    Refused {
        /// The program.
        program: String,
        /// What happened instead.
        why: String,
    },
    /// It has died.
    #[error("worker {pid} has died: {how}")]
    Died {
        /// Its process.
        pid: u32,
        /// How, as the kernel says it.
        how: String,
    },
    /// It could not be told something.
    #[error("worker {pid} could not be reached: {why}")]
    Unreached {
        /// Its process.
        pid: u32,
        /// What went wrong.
        why: String,
    },
}

impl WorkerProgram {
    fn start_error(&self, error: &io::Error) -> WorkerError {
        WorkerError::Start {
            program: self.path.display().to_string(),
            why: error.to_string(),
        }
    }

    fn refused(&self, why: impl Into<String>) -> WorkerError {
        WorkerError::Refused {
            program: self.path.display().to_string(),
            why: why.into(),
        }
    }
}
