//! The way from a handle to its VM: to the thread that serves it, in this process or in another.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Instant;

use forkvm_vmm::{FallbackCounts, PauseError, PausedVm};

use super::{HoldError, Message};
use crate::accounting::{AccountingError, VmCount};
use crate::fork::{CloneSpec, ForkError, Ticket};
use crate::fork_point::ForkPoint;
use crate::rewind::{RewindError, RewindWay};
use crate::saved::SaveError;

type WithPaused = Box<dyn FnOnce(Result<&mut PausedVm<'_>, PauseError>) + Send>;

/// What the holder of a handle can ask of a VM.
pub(crate) enum Ask {
    Fork(CloneSpec, Instant, Reply<Result<Ticket, ForkError>>),
    ForkPoint(CloneSpec, Instant, Reply<Result<Arc<ForkPoint>, ForkError>>),
    /// Never of a VM that lives elsewhere.
    WithPaused(WithPaused),
    /// To this directory, or to where its family saves.
    Save(Option<PathBuf>, Reply<Result<(), SaveError>>),
    /// To be held, or let go.
    Hold(bool, Reply<Result<(), HoldError>>),
    Fallbacks(Reply<Option<FallbackCounts>>),
    Rewind(RewindWay, Instant, Reply<Result<RewindWay, RewindError>>),
    MemoryUse(Reply<Result<VmCount, AccountingError>>),
    Input(Vec<u8>, Reply<usize>),
    Kill,
}

/// Takes the answer to an [`Ask`]. Dropped without one when the VM has ended.
pub(crate) struct Reply<T>(Box<dyn FnOnce(T) + Send>);

impl<T> Reply<T> {
    pub(crate) fn new(take: impl FnOnce(T) + Send + 'static) -> Reply<T> {
        Reply(Box::new(take))
    }

    pub(crate) fn give(self, answer: T) {
        (self.0)(answer);
    }
}

/// A VM that lives in another process, as the way to it.
pub(crate) trait Elsewhere: Send + Sync {
    /// The process.
    fn process(&self) -> u32;

    /// Passes on what is asked; `false` when the VM has ended.
    fn ask(&self, ask: Ask) -> bool;
}

/// See the module's text.
pub(super) enum Door {
    /// To a thread of this process.
    Here(Sender<Message>),
    /// To another process.
    Elsewhere(Arc<dyn Elsewhere>),
}

impl Door {
    /// Passes on what is asked; `false` when the VM has ended.
    pub(super) fn ask(&self, ask: Ask) -> bool {
        match self {
            Door::Here(inbox) => inbox.send(Message::Asked(ask)).is_ok(),
            Door::Elsewhere(elsewhere) => elsewhere.ask(ask),
        }
    }
}
