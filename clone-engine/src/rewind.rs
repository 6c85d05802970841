//! Rewinds: a clone goes back to its fork point, as often as it is asked to.
//!
//! Which ways there are and which one a host allows is decided here; `member/rewinding.rs` does it. The
//! clone keeps its handle, its name and its number, and gets a new generation id: it is another life. It
//! finds memory, vCPUs, devices and disks as a fresh clone of the fork point does, and the same answer to
//! its fork call.

use std::io;
use std::str::FromStr;
use std::sync::Arc;

use forkvm_devices::DeviceError;
use forkvm_vmm::{Kvm, MemoryError, PauseError, VmError};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::fork::ForkError;
use crate::spawn::SpawnError;
use crate::userfault::UserfaultError;

/// How a clone goes back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum RewindWay {
    /// As the host allows: [`InPlace`](RewindWay::InPlace) where that is right, otherwise
    /// [`FreshShell`](RewindWay::FreshShell).
    #[default]
    Auto,
    /// The pages that the clone has written are dropped, and the state is put back into the same VM.
    /// Right only where paging is two-dimensional: refused on a KVM that shadows page tables.
    InPlace,
    /// The same, and the memory slots are deleted and added again, so that KVM forgets all that it has
    /// derived of the guest's page tables: right everywhere, and milliseconds slower.
    SlotReadd,
    /// Another VM, from the pool of shells or built, takes the place of the old one, which is taken
    /// apart meanwhile. Right everywhere.
    FreshShell,
}

impl RewindWay {
    /// Every way, `auto` first.
    pub const ALL: [RewindWay; 4] = [
        RewindWay::Auto,
        RewindWay::InPlace,
        RewindWay::SlotReadd,
        RewindWay::FreshShell,
    ];

    /// The word in options and outputs.
    pub fn as_str(self) -> &'static str {
        match self {
            RewindWay::Auto => "auto",
            RewindWay::InPlace => "in-place",
            RewindWay::SlotReadd => "slot-readd",
            RewindWay::FreshShell => "fresh-shell",
        }
    }

    /// The way that is taken on this host, and why; never [`RewindWay::Auto`].
    pub(crate) fn choose(self, kvm: &Arc<Kvm>) -> Result<(RewindWay, &'static str), RewindError> {
        if matches!(self, RewindWay::SlotReadd | RewindWay::FreshShell) {
            return Ok((self, "it was asked for"));
        }
        match (self, kvm.sees_rewritten_tables()?) {
            (RewindWay::InPlace, true) => Ok((self, "it was asked for")),
            (RewindWay::InPlace, false) => Err(RewindError::Shadowed),
            (_, true) => Ok((RewindWay::InPlace, "paging is two-dimensional here")),
            (_, false) => Ok((
                RewindWay::FreshShell,
                "this KVM shadows page tables, and would keep translations from before",
            )),
        }
    }
}

impl std::fmt::Display for RewindWay {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for RewindWay {
    type Err = UnknownRewindWay;

    fn from_str(word: &str) -> Result<RewindWay, UnknownRewindWay> {
        let found = RewindWay::ALL.into_iter().find(|way| way.as_str() == word);
        found.ok_or_else(|| UnknownRewindWay(word.to_owned()))
    }
}

/// Not a word for a way to rewind.
#[derive(Debug, Error)]
#[error("{0:?} is no way to rewind: auto, in-place, slot-readd and fresh-shell are")]
pub struct UnknownRewindWay(String);

/// Why a clone was not rewound. It runs on as it was, but after [`RewindError::Broken`].
#[derive(Debug, Error)]
pub enum RewindError {
    /// It came of no fork.
    #[error("the VM is no clone, so there is no fork point to go back to: rewind a clone of it")]
    NoClone,
    /// It lives in a worker, where it failed.
    #[error("worker {process} could not rewind the clone: {why}")]
    InWorker {
        /// The worker.
        process: u32,
        /// What went wrong there.
        why: String,
    },
    /// Old translations would survive.
    #[error(
        "in-place is not right on this host: its KVM shadows page tables and would keep translations \
         from before the rewind; take fresh-shell or slot-readd, or let auto choose"
    )]
    Shadowed,
    /// This KVM could not be asked how it translates, or no VM could be had.
    #[error("the host refused a VM")]
    Vm(#[from] VmError),
    /// The guest has ended its machine, or a page of its memory can never be had.
    #[error("the machine has just ended: spawn another clone of its fork point")]
    Ended,
    /// A vCPU did not stop.
    #[error("the clone could not be paused")]
    Pause(#[from] PauseError),
    /// No room for another VM beside the old one.
    #[error("no other VM may be made to take its place")]
    Room(#[source] Box<ForkError>),
    /// Another VM could not be made.
    #[error("making the VM that would take its place failed")]
    Spawn(#[from] SpawnError),
    /// No random bytes for its new generation id.
    #[error("reading random bytes for the clone's generation id failed")]
    Identity(#[source] io::Error),
    /// It failed half-way: the clone has ended, with this reason.
    #[error("the rewind failed half-way, and the clone is ended")]
    Broken(#[from] Break),
}

/// What failed half-way.
#[derive(Debug, Error)]
pub enum Break {
    /// Its memory could not be put back.
    #[error("dropping the clone's pages failed")]
    Memory(#[from] MemoryError),
    /// Nor what watches it.
    #[error("lifting the protections of the clone's memory failed")]
    Userfault(#[from] UserfaultError),
    /// Its state could not be put back.
    #[error("putting the state back failed")]
    State(#[from] VmError),
    /// It could not be told who it is.
    #[error("telling the clone who it is failed")]
    Identity(#[from] DeviceError),
    /// Its end was decided meanwhile.
    #[error("a page of the clone's memory can never be had")]
    Condemned,
}
