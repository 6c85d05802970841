//! Shells made ahead: a clone that takes one from here needs no VM to be built.
//!
//! A shell is a VM with its vCPUs, their CPUID, its memory slots over reserved addresses, and all
//! threads that it will need, waiting. What is built depends on the machine's shape only (where RAM
//! lies, how many vCPUs, their CPUID), so a shell serves every fork point of that shape. A thread of the pool
//! builds what was taken anew, once nobody takes any more. A shell is used once.
//!
//! Spawners take from here; an empty pool builds on the spot. Whoever wants the best latency fills it
//! before ([`ForkPoint::fill_pool`](crate::ForkPoint::fill_pool)).

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use forkvm_vmm::{Kvm, MachineState, MemoryError, Ram, Shell, VmConfig, VmError};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::limits::{self, LimitError, Need};
use crate::parked::Parked;

/// How long nobody must have taken a shell before new ones are built: who takes some wants the CPUs
/// for what will run in them.
const REFILL_AFTER: Duration = Duration::from_millis(20);

/// How long a shelf may lack a shell because others are taken all the time.
const REFILL_AT_LAST: Duration = Duration::from_millis(100);

/// How a family's pool is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolConfig {
    /// Shells of each shape that are kept ready once clones of that shape were made; 0 for none but
    /// those that were asked for ([`ForkPoint::fill_pool`](crate::ForkPoint::fill_pool)). Where clones live in
    /// workers, each worker that had one keeps its share.
    pub shells: u32,
}

impl PoolConfig {
    /// Of each of `workers`: all of them together keep as many shells as this says, or a few more.
    pub(crate) fn shared_by(self, workers: usize) -> PoolConfig {
        PoolConfig {
            shells: self.shells.div_ceil(workers.max(1) as u32),
        }
    }
}

/// See the module's text. Shells that are left go with it.
pub struct Pool {
    shared: Arc<Shared>,
    refiller: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    kvm: Arc<Kvm>,
    config: PoolConfig,
    shelves: Mutex<Shelves>,
    /// Signalled when a shell was taken, and at the end.
    taken: Condvar,
}

#[derive(Default)]
struct Shelves {
    list: Vec<Shelf>,
    last_taken: Option<Instant>,
    ending: bool,
}

/// Shells of one shape.
struct Shelf {
    /// What they are primed with.
    model: Arc<MachineState>,
    shells: Vec<Pooled>,
    /// The last attempt at one more failed: not tried again until one is asked for.
    stuck: bool,
}

/// A shell, and the thread that will serve its VM.
pub(crate) struct Pooled {
    pub(crate) shell: Shell,
    pub(crate) thread: Parked,
}

impl Pooled {
    fn build(kvm: &Arc<Kvm>, model: &MachineState) -> Result<Pooled, PoolError> {
        let ram = Ram::reserve(model.layout().clone())?;
        Ok(Pooled {
            shell: Shell::build(kvm, model.config().vcpus, ram)?,
            thread: Parked::new().map_err(PoolError::Thread)?,
        })
    }

    /// Does ahead what would else be done when a state is put in.
    fn primed(mut self, model: &MachineState) -> Result<Pooled, PoolError> {
        self.shell.prime(model)?;
        Ok(self)
    }
}

impl Pool {
    pub(crate) fn new(kvm: Arc<Kvm>, config: PoolConfig) -> Pool {
        Pool {
            shared: Arc::new(Shared {
                kvm,
                config,
                shelves: Mutex::default(),
                taken: Condvar::new(),
            }),
            refiller: Mutex::new(None),
        }
    }

    /// A shell for a machine of the shape of `state`: a ready one, or a new one where there is none.
    pub(crate) fn take(&self, state: &Arc<MachineState>) -> Result<Pooled, PoolError> {
        let mut shelves = self.shared.lock();
        if self.shared.config.shells == 0 && shelves.list.is_empty() {
            drop(shelves);
            return Pooled::build(&self.shared.kvm, state);
        }
        shelves.last_taken = Some(Instant::now());
        let shelf = shelves.of(state);
        shelf.stuck = false;
        let ready = shelf.shells.pop();
        drop(shelves);
        if self.shared.config.shells > 0 {
            self.shared.taken.notify_one();
            self.start_refiller();
        }
        match ready {
            Some(ready) => Ok(ready),
            None => Pooled::build(&self.shared.kvm, state),
        }
    }

    /// Has `count` shells ready for the shape of `state`, if the host has room for them; those that
    /// are there count. Returns how many are there then.
    pub(crate) fn fill(&self, state: &Arc<MachineState>, count: u32) -> Result<u32, PoolError> {
        let ready = || {
            let mut shelves = self.shared.lock();
            shelves
                .find(state)
                .map_or(0, |shelf| shelf.shells.len() as u32)
        };
        if ready() < count {
            limits::grant(&Need::of_shells(state, false), count - ready(), false)?;
        }
        loop {
            let ready = ready();
            if ready >= count {
                return Ok(ready);
            }
            let one = Pooled::build(&self.shared.kvm, state)?.primed(state)?;
            self.shared.lock().of(state).shells.push(one);
        }
    }

    /// Shells that wait for machines with as much RAM and as many vCPUs as `config` says.
    pub(crate) fn ready(&self, config: &VmConfig) -> u32 {
        let shelves = self.shared.lock();
        let like = |shelf: &&Shelf| {
            let shape = shelf.model.config();
            (shape.memory_mib, shape.vcpus) == (config.memory_mib, config.vcpus)
        };
        let shells = shelves
            .list
            .iter()
            .filter(like)
            .map(|shelf| shelf.shells.len());
        shells.sum::<usize>() as u32
    }

    /// Shells that wait, of all shapes.
    pub fn waiting(&self) -> usize {
        let shelves = self.shared.lock();
        shelves.list.iter().map(|shelf| shelf.shells.len()).sum()
    }

    fn start_refiller(&self) {
        let mut refiller = self.refiller.lock().unwrap_or_else(PoisonError::into_inner);
        if refiller.is_some() {
            return;
        }
        let shared = self.shared.clone();
        let run = move || shared.refill();
        match thread::Builder::new().name("shell-pool".into()).spawn(run) {
            Ok(thread) => *refiller = Some(thread),
            // Shells are built when they are taken, then.
            Err(error) => tracing::warn!(%error, "no thread to refill the pool of shells"),
        }
    }
}

impl Shelves {
    /// Those of the shape of `state`, if there ever were any.
    fn find(&mut self, state: &MachineState) -> Option<&mut Shelf> {
        let mut shelves = self.list.iter_mut();
        shelves.find(|shelf| state.has_shape_of(&shelf.model))
    }

    /// Those of the shape of `state`, which is what they are primed with from now on: the newest is
    /// likely to be the most like the next.
    fn of(&mut self, state: &Arc<MachineState>) -> &mut Shelf {
        let mut shelves = self.list.iter();
        let found = shelves.position(|shelf| state.has_shape_of(&shelf.model));
        let index = found.unwrap_or_else(|| {
            self.list.push(Shelf {
                model: state.clone(),
                shells: Vec::new(),
                stuck: false,
            });
            self.list.len() - 1
        });
        self.list[index].model = state.clone();
        &mut self.list[index]
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Shelves> {
        self.shelves.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps every shelf full, until the end.
    fn refill(&self) {
        let mut shelves = self.lock();
        let mut lacking_since = None;
        while !shelves.ending {
            let lacks =
                |shelf: &&Shelf| !shelf.stuck && shelf.shells.len() < self.config.shells as usize;
            let Some(model) = shelves
                .list
                .iter()
                .find(lacks)
                .map(|shelf| shelf.model.clone())
            else {
                lacking_since = None;
                let woken = self.taken.wait(shelves);
                shelves = woken.unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let taken = shelves.last_taken.map_or(REFILL_AFTER, |at| at.elapsed());
            let lacking_since = *lacking_since.get_or_insert_with(Instant::now);
            if taken < REFILL_AFTER && lacking_since.elapsed() < REFILL_AT_LAST {
                let woken = self.taken.wait_timeout(shelves, REFILL_AFTER - taken);
                shelves = woken.unwrap_or_else(PoisonError::into_inner).0;
                continue;
            }
            drop(shelves);
            let built = self.build_one(&model);
            shelves = self.lock();
            // One of its shape is there: shelves stay.
            let Some(shelf) = shelves.find(&model) else {
                continue;
            };
            match built {
                Ok(one) => shelf.shells.push(one),
                Err(error) => {
                    tracing::warn!(error = %with_cause(&error), "the pool of shells cannot grow");
                    shelf.stuck = true;
                }
            }
        }
    }

    fn build_one(&self, model: &MachineState) -> Result<Pooled, PoolError> {
        limits::grant(&Need::of_shells(model, false), 1, false)?;
        Pooled::build(&self.kvm, model)?.primed(model)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.lock().ending = true;
        self.shared.taken.notify_one();
        let refiller = self.refiller.get_mut();
        let refiller = refiller.unwrap_or_else(PoisonError::into_inner).take();
        if let Some(Err(_panic)) = refiller.map(JoinHandle::join) {
            tracing::error!("the thread that refills the pool of shells panicked");
        }
    }
}

fn with_cause(error: &PoolError) -> String {
    match std::error::Error::source(error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}

/// Why there is no shell.
#[derive(Debug, Error)]
pub enum PoolError {
    /// The host has no room for so many.
    #[error(transparent)]
    Limits(#[from] LimitError),
    /// No addresses for its memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// KVM or the host refused a part of it.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// No thread to serve it.
    #[error("the host allows no more threads, see `ulimit -u`")]
    Thread(#[source] io::Error),
}
