//! Forks of clones that live in a worker: the worker has made the fork point, here it becomes one of the
//! family's, and clones of it are spawned wherever they are to live.
//!
//! Each in a thread of its own, since the thread that hears the worker must hear of these clones too.

use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::thread;
use std::time::{Duration, Instant};

use forkvm_abi::errno;

use super::link::Link;
use crate::family::Family;
use crate::fork::ForkError;
use crate::fork_point::ForkPoint;
use crate::identity::Identity;
use crate::member::{Member, errno_of, with_causes};
use crate::page_link::Landing;
use crate::phase::Phase;
use crate::spawn::SpawnError;
use crate::wire::socket::SocketError;
use crate::wire::{Order, Refusal, shortened};

/// A fork point as a worker tells of it.
pub(super) struct Froze {
    /// The parent's number.
    pub(super) clone: u64,
    /// The fork point's number in the worker.
    pub(super) point: u64,
    pub(super) by_guest: bool,
    /// Clones that are wanted.
    pub(super) clones: u32,
    pub(super) requested: Instant,
    /// With their lengths in nanoseconds.
    pub(super) phases: Vec<(Phase, u64)>,
    /// How long the parent stood still, in nanoseconds, if it goes on.
    pub(super) paused: Option<u64>,
    /// The descriptor, and the files that it names.
    pub(super) files: Result<Vec<OwnedFd>, SocketError>,
}

/// What the engine has of a clone that is forked.
pub(super) struct Parent {
    pub(super) family: Arc<Family>,
    /// Counts its clones.
    pub(super) numbers: Arc<AtomicU32>,
    pub(super) identity: Identity,
}

/// A fork point here, until the worker's fork is over.
pub(super) struct Born {
    pub(super) point: Arc<ForkPoint>,
    pub(super) clones: Vec<Arc<Member>>,
}

/// Spawns what is wanted, and tells the worker when it runs.
pub(super) fn spawn(link: &Arc<Link>, froze: Froze) {
    let (clone, point, by_guest) = (froze.clone, froze.point, froze.by_guest);
    link.state().forking.insert(clone);
    let serving = link.clone();
    let spawn = move || {
        let make = AssertUnwindSafe(|| make(&serving, froze));
        // Much of it is the embedder's code.
        let born = catch_unwind(make).unwrap_or_else(|_panic| {
            Err(ForkError::InWorker {
                process: serving.pid(),
                why: "the thread that spawned its clones panicked".into(),
            })
        });
        tell(&serving, point, by_guest, born);
        serving.state().forking.remove(&clone);
    };
    let thread = thread::Builder::new().name("fork".into());
    if let Err(error) = thread.spawn(spawn) {
        link.state().forking.remove(&clone);
        let why = format!("no thread to spawn its clones: {error}");
        let outcome = Err(Refusal {
            why,
            errno: errno::EIO,
            point,
        });
        link.send_later(Order::Spawned { point, outcome });
    }
}

/// The fork point and its clones, which run.
fn make(link: &Arc<Link>, froze: Froze) -> Result<Born, ForkError> {
    let Parent {
        family,
        numbers,
        identity,
    } = link.parent(froze.clone).ok_or(ForkError::Ended)?;
    let observer = family.config().observer.clone();
    for (phase, took) in froze.phases {
        observer.enter(phase, None)?;
        observer.leave(phase, Duration::from_nanos(took));
    }
    if let Some(paused) = froze.paused {
        observer.parent_paused(Duration::from_nanos(paused));
    }
    family.check_open()?;
    let files = froze.files.map_err(|error| ForkError::InWorker {
        process: link.pid(),
        why: with_causes(&error),
    })?;
    let landing = Landing {
        family: &family,
        link: link.pages(),
    };
    let point = ForkPoint::from_description(&family, files, &landing, froze.requested, &numbers);
    let mut point = point.map_err(SpawnError::from)?;
    // Names are given here: nobody else says what a clone of this family is called.
    (point.parent.name, point.parent.depth) = (identity.name, identity.depth);
    let point = Arc::new(point);
    // The worker keeps the fork point for no longer than until it is answered.
    link.pages().flush()?;
    let clones = match froze.clones {
        0 => Vec::new(),
        // The worker has looked at its own limits, not at those of this process.
        clones => point.spawn(clones)?,
    };
    Ok(Born { point, clones })
}

/// Tells the worker what came of it. What the worker does not learn any more is undone by whoever hears of
/// its end.
fn tell(link: &Arc<Link>, point: u64, by_guest: bool, born: Result<Born, ForkError>) {
    let outcome = match &born {
        Ok(_) => Ok(()),
        Err(error) => Err(Refusal {
            why: shortened(with_causes(error)),
            errno: errno_of(error),
            point,
        }),
    };
    if let (true, Ok(Born { clones, .. })) = (by_guest, &born) {
        for (index, clone) in (0..).zip(clones) {
            let link = Arc::downgrade(link);
            clone.when_ended(move |end| {
                if let Some(link) = link.upgrade() {
                    let end = end.clone();
                    link.send_later(Order::CloneEnded { point, index, end });
                }
            });
        }
    }
    match born {
        Ok(born) => link.keep(point, born),
        Err(error) if !by_guest => link.keep_refusal(point, error),
        Err(_) => {}
    }
    if let Err(error) = link.send(&Order::Spawned { point, outcome }) {
        tracing::debug!(%error, "a worker does not hear what became of its fork, so it ends");
        link.close();
    }
}
