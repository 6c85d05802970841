//! The phases of a fork, and who may watch them.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use forkvm_vmm::PausedVm;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::fork_point::ForkPoint;
use crate::member::Member;

/// What a fork goes through, in this order. The names are the spans of the trace and the columns of
/// measurements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Limits are checked; the number of clones is granted.
    Request,
    /// The parent's vCPUs come to the barrier. The parent's pause begins.
    Pause,
    /// vCPUs, interrupt controllers and devices are read.
    Save,
    /// Disks and memory are made immutable.
    Freeze,
    /// The parent runs on. Its pause ends.
    Resume,
    /// The image is sealed, if it is to be whole; else its first pages are brought.
    Publish,
    /// A clone's shell is taken from the pool, or built: VM, vCPUs, threads.
    Spawn,
    /// Its memory is mapped.
    Memory,
    /// Devices and the saved state are put in.
    Restore,
    /// The clone learns who it is; calls that were pending in the parent are answered.
    Identity,
    /// All clones are built and are let go.
    Run,
}

impl Phase {
    /// All phases in order.
    pub const ALL: [Phase; 11] = [
        Phase::Request,
        Phase::Pause,
        Phase::Save,
        Phase::Freeze,
        Phase::Resume,
        Phase::Publish,
        Phase::Spawn,
        Phase::Memory,
        Phase::Restore,
        Phase::Identity,
        Phase::Run,
    ];

    /// The name in traces and outputs.
    pub fn as_str(self) -> &'static str {
        match self {
            Phase::Request => "request",
            Phase::Pause => "pause",
            Phase::Save => "save",
            Phase::Freeze => "freeze",
            Phase::Resume => "resume",
            Phase::Publish => "publish",
            Phase::Spawn => "spawn",
            Phase::Memory => "memory",
            Phase::Restore => "restore",
            Phase::Identity => "identity",
            Phase::Run => "run",
        }
    }
}

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Watches forks. Called in the thread that forks: what it does is part of the phase.
pub trait Observer: Send + Sync {
    /// A phase begins. `paused` is the parent while it stands still. An error fails the phase, and
    /// with it the fork, which is rolled back: this is how tests prove the rollback.
    fn enter(&self, phase: Phase, paused: Option<&PausedVm<'_>>) -> Result<(), Vetoed>;

    /// A phase ended well after `took`.
    fn leave(&self, phase: Phase, took: Duration);

    /// The parent stood still for `took`, from the barrier's request to its run.
    fn parent_paused(&self, took: Duration);

    /// `clones` of `point` run.
    fn forked(&self, point: &Arc<ForkPoint>, clones: &[Arc<Member>]);
}

/// An observer did not let a phase happen.
#[derive(Debug, Error)]
#[error("an observer stopped it: {0}")]
pub struct Vetoed(pub String);

/// Watches nothing.
#[derive(Debug)]
pub struct NoObserver;

impl Observer for NoObserver {
    fn enter(&self, _phase: Phase, _paused: Option<&PausedVm<'_>>) -> Result<(), Vetoed> {
        Ok(())
    }

    fn leave(&self, _phase: Phase, _took: Duration) {}

    fn parent_paused(&self, _took: Duration) {}

    fn forked(&self, _point: &Arc<ForkPoint>, _clones: &[Arc<Member>]) {}
}

/// Keeps how long each phase took, and who came of it, for a report.
#[derive(Default)]
pub struct ForkLog {
    phases: Mutex<Vec<(Phase, Duration)>>,
    pauses: Mutex<Vec<Duration>>,
    clones: Mutex<Vec<Arc<Member>>>,
}

impl ForkLog {
    /// All clones so far, in the order in which they were made.
    pub fn clones(&self) -> Vec<Arc<Member>> {
        self.clones
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// All phases so far, in the order in which they ended.
    pub fn phases(&self) -> Vec<(Phase, Duration)> {
        self.phases
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// The parent's pauses so far.
    pub fn pauses(&self) -> Vec<Duration> {
        self.pauses
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl Observer for ForkLog {
    fn enter(&self, _phase: Phase, _paused: Option<&PausedVm<'_>>) -> Result<(), Vetoed> {
        Ok(())
    }

    fn leave(&self, phase: Phase, took: Duration) {
        self.phases
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push((phase, took));
    }

    fn parent_paused(&self, took: Duration) {
        self.pauses
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(took);
    }

    fn forked(&self, _point: &Arc<ForkPoint>, clones: &[Arc<Member>]) {
        self.clones
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .extend_from_slice(clones);
    }
}

/// A phase under way: in its span, timed. Dropped without [`Running::done`], it has failed.
pub(crate) struct Running<'a> {
    observer: &'a dyn Observer,
    phase: Phase,
    start: Instant,
    _span: tracing::span::EnteredSpan,
}

/// Begins `phase`; the observer may stop it.
pub(crate) fn begin<'a>(
    observer: &'a dyn Observer,
    phase: Phase,
    paused: Option<&PausedVm<'_>>,
) -> Result<Running<'a>, Vetoed> {
    let span = tracing::debug_span!("phase", %phase).entered();
    let start = Instant::now();
    observer.enter(phase, paused)?;
    Ok(Running {
        observer,
        phase,
        start,
        _span: span,
    })
}

impl Running<'_> {
    /// Ends it well.
    pub(crate) fn done(self) {
        let took = self.start.elapsed();
        tracing::debug!(took_us = took.as_micros() as u64, "done");
        self.observer.leave(self.phase, took);
    }
}
