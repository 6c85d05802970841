//! A running VM of a family: the handle that others hold.
//!
//! The VM itself belongs to the thread that serves it ([`serving`]). That thread hears of everything
//! through one inbox: what the vCPUs ask, the end, and what holders of the handle ask. So requests
//! are served one after the other, and nobody else ever touches the VM. What only has to be seen
//! ([`seen`]) goes past it.
//!
//! A VM that lives in a worker has such a thread there. Its handle here reaches it through a [`Door`]
//! that leads to the worker's socket, and what it shows comes back the same way.

mod door;
mod holding;
mod life;
mod rewinding;
mod seen;
mod serving;
mod waiting;

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use forkvm_devices::block::BlockLayer;
use forkvm_devices::device::GuestCall;
use forkvm_devices::virtio::blk::BlkCounters;
use forkvm_vmm::{EndReason, FallbackCounts, PauseError, PausedVm, VmConfig};
use thiserror::Error;

use crate::accounting::{AccountingError, MemoryUse, VmCount};
use crate::end::End;
use crate::fork::{CloneSpec, ForkError, Ticket};
use crate::fork_point::ForkPoint;
use crate::identity::Identity;
use crate::rewind::{RewindError, RewindWay};
use crate::saved::SaveError;
use crate::spawn::SpawnError;
use crate::timeline::Timeline;
use crate::working_set::{Recorder, WorkingSet};

use door::Door;
pub(crate) use door::{Ask, Elsewhere, Reply};
pub use holding::HoldError;
pub(crate) use life::Life;
use seen::Seen;
pub(crate) use seen::{Watch, Witness};
pub(crate) use serving::{errno_of, with_causes};
pub(crate) use waiting::Waiting;

/// How long the vCPUs may take to stand still when the host looks at them.
const PAUSE_DEADLINE: Duration = Duration::from_secs(5);

/// Handle of a VM. The VM runs on when all handles are dropped, until it ends or its family does.
pub struct Member {
    name: String,
    config: VmConfig,
    door: Door,
    watch: Arc<Watch>,
    touches: Option<Arc<Recorder>>,
    /// The thread that serves it, until somebody has waited for its end.
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// What is left of a VM that has ended.
#[derive(Clone)]
pub struct Finished {
    /// How it ended.
    pub end: End,
    /// Its disks, with what it wrote to them, in the order of its configuration. None are left of a VM
    /// whose process died, nor of one that could not be torn down.
    pub disks: Vec<Arc<dyn BlockLayer>>,
    /// What each disk did in this VM.
    pub blk_counters: Vec<BlkCounters>,
}

enum Message {
    Call {
        life: u32,
        vcpu: u32,
        call: GuestCall,
        at: Instant,
    },
    Ended {
        life: u32,
        reason: EndReason,
    },
    /// A page of its memory can never be had.
    Lost {
        life: u32,
        why: String,
    },
    /// The holder of a handle.
    Asked(Ask),
    ClonesEnded,
}

/// Where a VM's events will go, made before the VM is.
pub(crate) struct Inbox {
    sender: Sender<Message>,
    receiver: Receiver<Message>,
    watch: Arc<Watch>,
    life: Life,
    origin: Option<Origin>,
}

impl Inbox {
    /// For the VM `identity`; `witness` hears what it shows.
    pub(crate) fn new(identity: Identity, witness: Option<Arc<dyn Witness>>) -> Inbox {
        let (sender, receiver) = channel();
        let watch = Arc::new(Watch::new(identity, witness));
        Inbox {
            life: Life::first(sender.clone(), watch.clone()),
            sender,
            receiver,
            watch,
            origin: None,
        }
    }

    /// For a clone.
    pub(crate) fn of_clone(origin: Origin, witness: Option<Arc<dyn Witness>>) -> Inbox {
        Inbox {
            origin: Some(origin.clone()),
            ..Inbox::new(origin.identity, witness)
        }
    }

    /// The life that begins with the VM's start.
    pub(crate) fn life(&self) -> &Life {
        &self.life
    }
}

/// What a clone came of, and goes back to when it is rewound.
#[derive(Clone)]
pub(crate) struct Origin {
    pub(crate) point: Arc<ForkPoint>,
    /// Who it was then. The generation id is of its first life.
    pub(crate) identity: Identity,
    /// Clones that the guest's call was granted.
    pub(crate) granted: u32,
}

impl Member {
    /// The handle of a VM that lives elsewhere.
    pub(crate) fn elsewhere(
        name: String,
        config: VmConfig,
        elsewhere: Arc<dyn Elsewhere>,
        watch: Arc<Watch>,
    ) -> Member {
        Member {
            name,
            config,
            door: Door::Elsewhere(elsewhere),
            touches: None,
            watch,
            thread: Mutex::new(None),
        }
    }

    /// The process that it lives in, if that is not this one.
    pub fn process(&self) -> Option<u32> {
        match &self.door {
            Door::Here(_) => None,
            Door::Elsewhere(elsewhere) => Some(elsewhere.process()),
        }
    }

    /// Its name, such as `X.1`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it and those that share its image have touched first until now: the clones of one fork
    /// point, or a VM that was restored with lazy memory. Empty if that is not recorded.
    pub fn working_set(&self) -> WorkingSet {
        let touches = self.touches.as_ref();
        touches.map_or_else(WorkingSet::default, |touches| touches.working_set())
    }

    /// Who it is.
    pub fn identity(&self) -> Identity {
        self.watch.identity()
    }

    /// What it is.
    pub fn config(&self) -> &VmConfig {
        &self.config
    }

    /// When it passed the end points of its start, as far as it has.
    pub fn timeline(&self) -> Timeline {
        self.watch.lock().timeline
    }

    /// What the guest has reported so far, and when it was seen: the first 4,096 reports.
    pub fn reports(&self) -> Vec<(u32, Instant)> {
        self.watch.lock().reports.clone()
    }

    /// Forks it. All clones run, or none and the VM runs on as before.
    pub fn fork(&self, spec: CloneSpec) -> Result<Ticket, MemberError> {
        self.ask(|reply| Ask::Fork(spec, Instant::now(), reply))?
            .map_err(MemberError::Fork)
    }

    /// Makes a fork point without spawning a clone. The VM runs on, but with freeze `stop`.
    pub fn fork_point(&self, spec: CloneSpec) -> Result<Arc<ForkPoint>, MemberError> {
        self.ask(|reply| Ask::ForkPoint(spec, Instant::now(), reply))?
            .map_err(MemberError::Fork)
    }

    /// Runs `look` while the VM stands still. That can only be where the VM is: an error for one that
    /// lives in another process.
    /// It stands no longer than that, unless it is held ([`pause`](Member::pause)).
    pub fn with_paused<T: Send + 'static>(
        &self,
        look: impl FnOnce(&mut PausedVm<'_>) -> T + Send + 'static,
    ) -> Result<T, MemberError> {
        if let Some(process) = self.process() {
            let name = self.name.clone();
            return Err(MemberError::Elsewhere { name, process });
        }
        let answer = self.ask(|reply: Reply<Result<T, PauseError>>| {
            Ask::WithPaused(Box::new(move |paused| reply.give(paused.map(look))))
        })?;
        Ok(answer?)
    }

    /// Saves it to where its family saves, and ends it ([`End::Saved`]). On an error it goes on as before.
    pub fn save(&self) -> Result<(), MemberError> {
        self.ask(|reply| Ask::Save(None, reply))?
            .map_err(MemberError::Save)
    }

    /// The same to the directory `dir`, which does not exist, with an absolute path.
    pub fn save_to(&self, dir: PathBuf) -> Result<(), MemberError> {
        self.ask(|reply| Ask::Save(Some(dir), reply))?
            .map_err(MemberError::Save)
    }

    /// How often each instruction was carried out for a software KVM in it; `None` where KVM needs no such
    /// help.
    pub fn fallback_counts(&self) -> Result<Option<FallbackCounts>, MemberError> {
        self.ask(Ask::Fallbacks)
    }

    /// Puts a clone back at its fork point by `way`, and says which way was taken. It begins another
    /// life there: as a fresh clone of the same name and number, with a new generation id, and what was
    /// seen of the old life ([`reports`](Member::reports), [`timeline`](Member::timeline)) is forgotten.
    /// Clones that it made run on.
    pub fn rewind(&self, way: RewindWay) -> Result<RewindWay, MemberError> {
        self.ask(|reply| Ask::Rewind(way, Instant::now(), reply))?
            .map_err(MemberError::Rewind)
    }

    /// What it takes of the host's memory. It runs on while it is counted; while it is being forked the
    /// answer waits, so not to be asked by the observer of that fork.
    pub fn memory_use(&self) -> Result<MemoryUse, MemberError> {
        Ok(self.count_memory()?.taken)
    }

    /// The same, with the memory file that is its own.
    pub(crate) fn count_memory(&self) -> Result<VmCount, MemberError> {
        Ok(self.ask(Ask::MemoryUse)??)
    }

    /// Sends bytes to its serial console; returns how many it took.
    pub fn console_input(&self, bytes: &[u8]) -> Result<usize, MemberError> {
        self.ask(|reply| Ask::Input(bytes.to_vec(), reply))
    }

    /// Ends it; [`Member::wait`] returns when it is gone. Nothing happens to one that has ended.
    pub fn kill(&self) {
        if !self.door.ask(Ask::Kill) {
            tracing::trace!(vm = self.name, "killed after its end");
        }
    }

    /// Has `call` called at its end, or now if that was before: by the thread in which that happens, which
    /// it must not hold up.
    pub fn when_ended(&self, call: impl FnOnce(&End) + Send + 'static) {
        self.watch.when_ended(call);
    }

    fn thread(&self) -> MutexGuard<'_, Option<JoinHandle<()>>> {
        self.thread.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until it has ended. Nothing of it is left then but what handles of it hold.
    pub fn wait(&self) -> Finished {
        let seen = self.watch.wait_until(None, |seen| seen.finished.is_some());
        let finished = seen.finished.clone().expect("waited for it");
        drop(seen);
        self.join_thread();
        finished
    }

    /// Waits until it has ended, or until `deadline` has passed.
    pub fn wait_for(&self, deadline: Duration) -> Option<Finished> {
        let ended = |seen: &Seen| seen.finished.is_some();
        let finished = self
            .watch
            .wait_until(Some(deadline), ended)
            .finished
            .clone()?;
        self.join_thread();
        Some(finished)
    }

    /// The thread's last act is to tell the end, but until it is gone it holds the disks. Whoever
    /// comes second waits for the first.
    fn join_thread(&self) {
        let mut thread = self.thread();
        if let Some(Err(_panic)) = thread.take().map(JoinHandle::join) {
            tracing::error!(vm = self.name, "the thread that served it panicked");
        }
    }

    /// Waits until the guest has reported `value`, for the `times`th time. An error when the VM
    /// ends before, or when `deadline` passes.
    pub fn wait_report(
        &self,
        value: u32,
        times: usize,
        deadline: Duration,
    ) -> Result<(), MemberError> {
        let reported = |seen: &Seen| seen.count(value) >= times;
        let seen = self.watch.wait_until(Some(deadline), |seen| {
            reported(seen) || seen.finished.is_some()
        });
        if reported(&seen) {
            return Ok(());
        }
        Err(match &seen.finished {
            Some(finished) => MemberError::Ended {
                name: self.name.clone(),
                end: finished.end.clone(),
            },
            None => MemberError::Silent {
                name: self.name.clone(),
                value,
                deadline,
            },
        })
    }

    /// Asks without waiting; `false` when it has ended.
    pub(crate) fn ask_later(&self, ask: Ask) -> bool {
        self.door.ask(ask)
    }

    /// Asks and waits for the answer of the thread that serves the VM.
    fn ask<T: Send + 'static>(&self, ask: impl FnOnce(Reply<T>) -> Ask) -> Result<T, MemberError> {
        let (reply, answer) = channel();
        let reply = Reply::new(move |answer| {
            if reply.send(answer).is_err() {
                tracing::debug!("nobody waits for an answer any more");
            }
        });
        if self.door.ask(ask(reply))
            && let Ok(answer) = answer.recv()
        {
            return Ok(answer);
        }
        Err(MemberError::Ended {
            name: self.name.clone(),
            end: self.wait().end,
        })
    }
}

/// Why a VM could not do what it was asked.
#[derive(Debug, Error)]
pub enum MemberError {
    /// It has ended.
    #[error("VM {name} has ended: it {end}")]
    Ended {
        /// Its name.
        name: String,
        /// How.
        end: End,
    },
    /// It did not report in time.
    #[error("VM {name} did not report {value:#x} within {deadline:?}")]
    Silent {
        /// Its name.
        name: String,
        /// The report.
        value: u32,
        /// How long was waited.
        deadline: Duration,
    },
    /// It lives in another process.
    #[error(
        "VM {name} lives in process {process}: only code of that process can look at it while it \
         stands still"
    )]
    Elsewhere {
        /// Its name.
        name: String,
        /// The worker.
        process: u32,
    },
    /// It could not be paused.
    #[error(transparent)]
    Pause(#[from] PauseError),
    /// It could not be held.
    #[error(transparent)]
    Hold(#[from] HoldError),
    /// No shells for its clones.
    #[error("no shells could be built for its clones")]
    Shells(#[source] SpawnError),
    /// It could not be forked.
    #[error("the fork failed, and the VM runs on")]
    Fork(#[source] ForkError),
    /// Its memory could not be counted.
    #[error("counting the VM's memory failed")]
    MemoryUse(#[from] AccountingError),
    /// It could not be rewound.
    #[error("the rewind failed")]
    Rewind(#[source] RewindError),
    /// It could not be saved.
    #[error("saving failed, and the VM runs on")]
    Save(#[source] SaveError),
}
