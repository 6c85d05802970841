//! What the engine and its workers say to each other.
//!
//! A worker is a process of the same host in which clones run ([`crate::worker`]); the engine's end
//! is [`crate::spawn::process`]. They talk over one Unix socket: messages of CBOR, each whole or not
//! there at all, with descriptors beside them ([`socket`]); a second socket is for pages
//! ([`crate::page_link`]). Times cross as the host's monotonic clock ([`clock`]). A number names a clone, a
//! family, a request or a fork point for as long as both know it: the engine gives them, but those of
//! fork points that a worker made.
//!
//! Both ends are of one build: [`Told::Hello`] carries version and protocol, and the engine lets
//! no other worker in.

pub(crate) mod clock;
pub(crate) mod disks;
pub(crate) mod socket;

use std::path::PathBuf;

use forkvm_devices::virtio::blk::BlkCounters;
use forkvm_vmm::FallbackCounts;
use serde::{Deserialize, Serialize};

use crate::accounting::MemoryUse;
use crate::end::End;
use crate::fault::FaultConfig;
use crate::fork::CloneSpec;
use crate::identity::Identity;
use crate::limits::LimitError;
use crate::phase::Phase;
use crate::pool::PoolConfig;
use crate::rewind::RewindWay;

use clock::HostTime;
use disks::HeldOverlay;

/// Raised with every change of what is said.
pub(crate) const PROTOCOL: u32 = 5;

/// Version of this build; both ends have the same.
pub(crate) const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Most bytes of console input in one message; a guest's UART takes far fewer at once.
pub(crate) const MOST_INPUT: usize = 4096;

/// What the engine asks of a worker.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Order {
    /// First of all: where pages are asked for. With the worker's end of the socket of
    /// [`crate::page_link`].
    Pages,
    /// Clones of a family will be asked for.
    Family {
        /// Its number.
        family: u64,
        /// How page faults of its lazy memory are served.
        faults: FaultConfig,
        /// The worker's share of its pool.
        pool: PoolConfig,
        /// How a fork that a guest asks for is done; its count is the guest's.
        guest_forks: CloneSpec,
    },
    /// No more will be: its VMs have all ended.
    ForgetFamily {
        /// Its number.
        family: u64,
    },
    /// Clones of a fork point will be asked for. With the memfd of its descriptor
    /// ([`crate::descriptor`]) and the files that this names.
    ForkPoint {
        /// Its number.
        point: u64,
        /// Of this family.
        family: u64,
    },
    /// No more will be. Clones that are there keep what they need.
    Forget {
        /// Its number.
        point: u64,
    },
    /// Have shells ready for clones of the shape of a state, which comes in a memfd. Answered by
    /// [`Told::Filled`].
    Fill {
        /// Number of this request.
        request: u64,
        /// For clones of this family.
        family: u64,
        /// How many; those that are there count.
        shells: u32,
    },
    /// Prepare a clone. Answered by [`Told::Prepared`].
    Prepare {
        /// Of this fork point.
        point: u64,
        /// Its number.
        clone: u64,
        /// Who it is.
        identity: Identity,
        /// Clones of its fork.
        granted: u32,
        /// Where it is saved to, if it is; nothing there yet.
        save_to: Option<PathBuf>,
        /// The path of its vsock, if it has one; with the socket that listens there.
        vsock: Option<PathBuf>,
    },
    /// Let a prepared clone run.
    Start {
        /// Which.
        clone: u64,
    },
    /// Take a prepared clone back.
    Drop {
        /// Which.
        clone: u64,
    },
    /// End a clone.
    Kill {
        /// Which.
        clone: u64,
    },
    /// Bytes for its console. Answered by [`Told::Taken`], or by its end.
    Input {
        /// Which.
        clone: u64,
        /// Number of this request.
        request: u64,
        /// At most [`MOST_INPUT`].
        #[serde(with = "serde_bytes")]
        bytes: Vec<u8>,
    },
    /// Count its memory. Answered by [`Told::MemoryUsed`], or by its end.
    MemoryUse {
        /// Which.
        clone: u64,
        /// Number of this request.
        request: u64,
    },
    /// Save it and end it. Answered by [`Told::Saved`], or by its end.
    Save {
        /// Which.
        clone: u64,
        /// Number of this request.
        request: u64,
        /// To this directory, rather than to where it was said to be saved.
        dir: Option<PathBuf>,
    },
    /// Hold it, or let it go. Answered by [`Told::Held`], or by its end.
    Hold {
        /// Which.
        clone: u64,
        /// Number of this request.
        request: u64,
        /// Whether it is to stand.
        held: bool,
    },
    /// Count what was carried out for a software KVM. Answered by [`Told::Fallbacks`], or by its end.
    Fallbacks {
        /// Which.
        clone: u64,
        /// Number of this request.
        request: u64,
    },
    /// Put it back at its fork point. Answered by [`Told::Rewound`], or by its end.
    Rewind {
        /// Which.
        clone: u64,
        /// Number of this request.
        request: u64,
        /// How.
        way: RewindWay,
    },
    /// Fork it. Answered by [`Told::Forked`], or by its end.
    Fork {
        /// Which.
        clone: u64,
        /// Number of this request.
        request: u64,
        /// Into what.
        spec: CloneSpec,
        /// Whether only the fork point is wanted, without a clone.
        point_only: bool,
        /// When it was asked for.
        at: HostTime,
    },
    /// Answer to [`Told::Froze`]: what became of its fork point.
    Spawned {
        /// Which, by its number in the worker.
        point: u64,
        /// Its clones run, all that were asked for; or none does.
        outcome: Result<(), Refusal>,
    },
    /// A clone of a fork point that the worker's guest asked for has ended.
    CloneEnded {
        /// Of which, by its number in the worker.
        point: u64,
        /// Which of its clones, from 0 on.
        index: u32,
        /// How.
        end: End,
    },
}

/// What a worker tells the engine. What it tells of one clone comes in the order in which it happened:
/// a guest's text before the report that it made after it, and all before the end.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Told {
    /// First of all.
    Hello {
        /// [`PROTOCOL`] of the worker.
        protocol: u32,
        /// [`VERSION`] of the worker.
        version: String,
        /// Why it cannot work, if it cannot.
        broken: Option<String>,
    },
    /// Clones that are prepared from now on may wait for pages. With copies of the userfaultfds by which
    /// the worker answers them: should it die, the engine must.
    Watches {
        /// Of clones of this family.
        family: u64,
    },
    /// Answer to [`Order::Fill`].
    Filled {
        /// The request.
        request: u64,
        /// Shells that are there, or why there are not so many.
        outcome: Result<u32, String>,
    },
    /// A clone stands ready to start, or could not be prepared.
    Prepared {
        /// Which.
        clone: u64,
        /// What came of it.
        outcome: Result<Readiness, String>,
    },
    /// It was rewound, and goes on as another life: what comes now is of that.
    Reborn {
        /// Which.
        clone: u64,
        /// Who it is now.
        identity: Identity,
        /// When that was asked for.
        asked: HostTime,
        /// Its VM existed.
        built: HostTime,
        /// State and memory were in place.
        restored: HostTime,
    },
    /// It was forked, and counts that.
    Identified {
        /// Which.
        clone: u64,
        /// Who it is now.
        identity: Identity,
    },
    /// A fork point was made of it: `clones` clones of it are wanted. Answered by [`Order::Spawned`]. With
    /// the memfd of its descriptor ([`crate::descriptor`]) and the files that this names.
    Froze {
        /// Which.
        clone: u64,
        /// The fork point's number in the worker.
        point: u64,
        /// Whether its guest asked for it.
        by_guest: bool,
        /// How many of it.
        clones: u32,
        /// When it was asked for.
        requested: HostTime,
        /// Phases of its making, as they ended, with their lengths in nanoseconds.
        phases: Vec<(Phase, u64)>,
        /// How long the parent stood still, in nanoseconds, if it goes on.
        paused: Option<u64>,
    },
    /// Nobody in the worker speaks of a fork point of its own any more.
    Forget {
        /// Its number in the worker.
        point: u64,
    },
    /// Answer to [`Order::Fork`].
    Forked {
        /// The request.
        request: u64,
        /// What came of it.
        outcome: Result<ForkMade, NotForked>,
    },
    /// Answer to [`Order::Rewind`].
    Rewound {
        /// The request.
        request: u64,
        /// By which way.
        outcome: Result<RewindWay, NotRewound>,
    },
    /// Its first KVM_RUN is entered.
    Ran {
        /// Which.
        clone: u64,
        /// When.
        at: HostTime,
    },
    /// Its guest did something that is seen outside, for the first time.
    Acted {
        /// Which.
        clone: u64,
        /// When.
        at: HostTime,
    },
    /// Its guest reported something.
    Reported {
        /// Which.
        clone: u64,
        /// What.
        value: u32,
        /// When.
        at: HostTime,
    },
    /// It printed something.
    Printed {
        /// Which.
        clone: u64,
        /// What.
        #[serde(with = "serde_bytes")]
        bytes: Vec<u8>,
    },
    /// Answer to [`Order::Input`].
    Taken {
        /// The request.
        request: u64,
        /// Bytes that the console had room for.
        bytes: usize,
    },
    /// Answer to [`Order::MemoryUse`].
    MemoryUsed {
        /// The request.
        request: u64,
        /// What it takes, or why that is not known.
        outcome: Result<MemoryUse, String>,
    },
    /// Answer to [`Order::Save`].
    Saved {
        /// The request.
        request: u64,
        /// Why it was not saved.
        failed: Option<String>,
    },
    /// Answer to [`Order::Hold`].
    Held {
        /// The request.
        request: u64,
        /// Why it is not.
        failed: Option<String>,
    },
    /// Answer to [`Order::Fallbacks`].
    Fallbacks {
        /// The request.
        request: u64,
        /// By instruction; `None` where none need be.
        counts: Option<FallbackCounts>,
    },
    /// It is gone. With the files that its disks name.
    Ended {
        /// Which.
        clone: u64,
        /// How.
        end: End,
        /// What each disk did in it.
        counters: Vec<BlkCounters>,
        /// What each disk holds over what its fork point had, in the order of the configuration: one
        /// overlay and one more for each fork that found it written, from the bottom up; none for a
        /// disk that the guest could not write to. With the bytes of all maps in a memfd of their
        /// own, before the data files.
        disks: Vec<Vec<HeldOverlay>>,
    },
}

/// Most bytes of a reason.
const LONG_REASON: usize = 4096;

/// `why`, so that it fits into a message.
pub(crate) fn shortened(mut why: String) -> String {
    if why.len() > LONG_REASON {
        let mut cuts = (0..=LONG_REASON).rev();
        let cut = cuts.find(|cut| why.is_char_boundary(*cut));
        why.truncate(cut.unwrap_or_default());
    }
    why
}

/// A fork of a clone that succeeded.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ForkMade {
    /// Number of the fork on its parent.
    pub(crate) ticket: u32,
    /// The fork point's number in the worker.
    pub(crate) point: u64,
}

/// Why clones of a fork point do not run, for the worker that made it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Refusal {
    /// In words.
    pub why: String,
    /// What a guest is told: an errno of [`forkvm_abi::errno`].
    pub errno: i64,
    /// The fork point, by its number in the worker.
    pub(crate) point: u64,
}

/// Why a clone was not forked.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum NotForked {
    /// The host has no room.
    Limits(LimitError),
    /// The engine found why, at this fork point.
    Refused {
        /// Its number in the worker.
        point: u64,
    },
    /// Something else.
    Failed(String),
}

/// Why a clone was not rewound.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum NotRewound {
    /// Old translations would survive.
    Shadowed,
    /// It has just ended.
    Ended,
    /// Something else.
    Failed(String),
}

/// A clone that waits for its start.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Readiness {
    /// Phases of its making, as they ended, with their lengths in nanoseconds.
    pub(crate) phases: Vec<(Phase, u64)>,
    /// The VM object existed.
    pub(crate) built: HostTime,
    /// State and memory were in place.
    pub(crate) restored: HostTime,
    /// Shells that the worker has left for machines of its kind.
    pub(crate) shells: u32,
}
