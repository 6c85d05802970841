//! Watches the demo's forks: the engine's trace, and the memory that clones take.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, ThreadId};
use std::time::Duration;

use forkvm_clone_engine::accounting::{AccountingError, HostKernelUse, ProcessUse};
use forkvm_clone_engine::spawn::Spawner;
use forkvm_clone_engine::{ForkPoint, Member, Observer, Phase, Vetoed};
use forkvm_vmm::PausedVm;

/// How often memory is read while clones run.
const SAMPLE_EVERY: Duration = Duration::from_millis(25);

/// Memory that came on top of what was used before the parent was booted, at most, in KiB. It is
/// first read when the clones run, so that the reading does not slow the fork.
#[derive(Clone, Copy, Debug, Default)]
pub struct Growth {
    /// Anonymous memory of this process, and of those that clones live in: what the VMs wrote since the fork.
    pub private_kib: u64,
    /// Kernel memory of the host, as [`HostKernelUse`] counts it.
    pub kernel_kib: u64,
}

/// A fork that succeeded.
pub struct Fork {
    /// Where the clones came from.
    pub point: Arc<ForkPoint>,
    /// They.
    pub clones: Vec<Arc<Member>>,
    /// Phases of it, as they ended.
    pub phases: Vec<(Phase, Duration)>,
    /// How long the parent stood still; `None` when it did not go on.
    pub parent_pause: Option<Duration>,
}

/// What was seen so far of a fork that is under way.
#[derive(Default)]
struct UnderWay {
    phases: Vec<(Phase, Duration)>,
    parent_pause: Option<Duration>,
}

/// See the module's text.
pub struct DemoObserver {
    before: Option<Usage>,
    spawner: Arc<dyn Spawner>,
    depth: u32,
    /// A clone may fork before its parent's fork has told its end; but a thread does one at a time.
    under_way: Mutex<HashMap<ThreadId, UnderWay>>,
    forks: Mutex<Vec<Fork>>,
    growth: Arc<Mutex<Growth>>,
}

impl DemoObserver {
    /// Remembers what is used now, before the parent is booted. The clones that work will be `depth`
    /// forks below it, made by `spawner`.
    pub fn before_boot(depth: u32, spawner: &Arc<dyn Spawner>) -> DemoObserver {
        DemoObserver {
            before: Usage::now(spawner.as_ref()),
            spawner: spawner.clone(),
            depth,
            under_way: Mutex::default(),
            forks: Mutex::default(),
            growth: Arc::default(),
        }
    }

    /// Hands out the forks so far, the deepest one last. They are not kept: they hold their family,
    /// and that its observer.
    pub fn take_forks(&self) -> Vec<Fork> {
        let mut forks =
            std::mem::take(&mut *self.forks.lock().unwrap_or_else(PoisonError::into_inner));
        forks.sort_by_key(|fork| fork.point.depth());
        forks
    }

    /// What the calling thread has under way.
    fn with_own<T>(&self, act: impl FnOnce(&mut UnderWay) -> T) -> T {
        let mut under_way = self
            .under_way
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        act(under_way.entry(thread::current().id()).or_default())
    }

    /// Memory that the clones took, at most.
    pub fn growth(&self) -> Growth {
        *self.growth.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Samples memory from now on, until the observer is gone.
    fn start_sampling(&self) {
        let Some(before) = self.before else { return };
        let (growth, spawner) = (Arc::downgrade(&self.growth), self.spawner.clone());
        let sample = move || {
            while let (Some(growth), Some(now)) = (growth.upgrade(), Usage::now(spawner.as_ref())) {
                let mut growth = growth.lock().unwrap_or_else(PoisonError::into_inner);
                let grown = |now: u64, before: u64| now.saturating_sub(before);
                let private_kib = grown(now.process.anonymous_kib, before.process.anonymous_kib);
                let kernel_kib = grown(now.kernel.total_kib(), before.kernel.total_kib());
                growth.private_kib = growth.private_kib.max(private_kib);
                growth.kernel_kib = growth.kernel_kib.max(kernel_kib);
                drop(growth);
                thread::sleep(SAMPLE_EVERY);
            }
        };
        if let Err(error) = thread::Builder::new()
            .name("memory-sampler".into())
            .spawn(sample)
        {
            tracing::warn!(%error, "the clones' memory is not measured");
        }
    }
}

impl Observer for DemoObserver {
    fn enter(&self, phase: Phase, _paused: Option<&PausedVm<'_>>) -> Result<(), Vetoed> {
        if phase == Phase::Request {
            // What an earlier fork of this VM left, that failed.
            self.with_own(|own| *own = UnderWay::default());
        }
        Ok(())
    }

    fn leave(&self, phase: Phase, took: Duration) {
        self.with_own(|own| own.phases.push((phase, took)));
    }

    fn parent_paused(&self, took: Duration) {
        self.with_own(|own| own.parent_pause = Some(took));
    }

    fn forked(&self, point: &Arc<ForkPoint>, clones: &[Arc<Member>]) {
        let UnderWay {
            phases,
            parent_pause,
        } = self.with_own(std::mem::take);
        let fork = Fork {
            point: point.clone(),
            clones: clones.to_vec(),
            phases,
            parent_pause,
        };
        self.forks
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(fork);
        if point.depth() == self.depth {
            self.start_sampling();
        }
    }
}

/// What the kernel accounts at one instant.
#[derive(Clone, Copy)]
struct Usage {
    process: ProcessUse,
    kernel: HostKernelUse,
}

impl Usage {
    /// Of this process, those of `spawner`, and the host.
    fn now(spawner: &dyn Spawner) -> Option<Usage> {
        let read = || {
            let mut process = ProcessUse::now()?;
            // One that has died uses nothing.
            for other in spawner.processes().into_iter().flat_map(ProcessUse::of) {
                process.anonymous_kib += other.anonymous_kib;
                process.page_tables_kib += other.page_tables_kib;
            }
            Ok::<_, AccountingError>(Usage {
                process,
                kernel: HostKernelUse::now()?,
            })
        };
        read()
            .inspect_err(|error| tracing::warn!(%error, "the clones' memory is not measured"))
            .ok()
    }
}
