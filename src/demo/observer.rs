//! Watches the demo's fork: the engine's trace, and the memory that clones take.

use std::fs;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use forkvm_clone_engine::{ForkLog, ForkPoint, Member, Observer, Phase, Vetoed};
use forkvm_vmm::PausedVm;

/// How often memory is read while clones run.
const SAMPLE_EVERY: Duration = Duration::from_millis(25);

/// Memory that came on top of what was used before the parent was booted, at most, in KiB. It is
/// first read when the clones run, so that the reading does not slow the fork.
#[derive(Clone, Copy, Debug, Default)]
pub struct Growth {
    /// Anonymous memory of this process: what the VMs wrote since the fork.
    pub private_kib: u64,
    /// Kernel memory of the host: page tables, slabs, stacks.
    pub kernel_kib: u64,
}

/// A fork point and the clones that came of it.
pub type Fork = (Arc<ForkPoint>, Vec<Arc<Member>>);

/// See the module's text.
pub struct DemoObserver {
    before: Option<Usage>,
    log: ForkLog,
    fork: Mutex<Option<Fork>>,
    growth: Arc<Mutex<Growth>>,
}

impl DemoObserver {
    /// Remembers what is used now, before the parent is booted.
    pub fn before_boot() -> DemoObserver {
        DemoObserver {
            before: Usage::now(),
            log: ForkLog::default(),
            fork: Mutex::default(),
            growth: Arc::default(),
        }
    }

    /// Hands out the fork and its clones; `None` before it. They are not kept: they hold their family,
    /// and that its observer.
    pub fn take_fork(&self) -> Option<Fork> {
        self.fork
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }

    /// Phases so far.
    pub fn phases(&self) -> Vec<(Phase, Duration)> {
        self.log.phases()
    }

    /// How long the parent stood still; `None` when it did not go on.
    pub fn parent_pause(&self) -> Option<Duration> {
        self.log.pauses().first().copied()
    }

    /// Memory that the clones took, at most.
    pub fn growth(&self) -> Growth {
        *self.growth.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Samples memory from now on, until the observer is gone.
    fn start_sampling(&self) {
        let Some(before) = self.before else { return };
        let growth = Arc::downgrade(&self.growth);
        let sample = move || {
            while let (Some(growth), Some(now)) = (growth.upgrade(), Usage::now()) {
                let mut growth = growth.lock().unwrap_or_else(PoisonError::into_inner);
                let private_kib = now.anonymous_kib.saturating_sub(before.anonymous_kib);
                let kernel_kib = now.kernel_kib.saturating_sub(before.kernel_kib);
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
    fn enter(&self, _phase: Phase, _paused: Option<&PausedVm<'_>>) -> Result<(), Vetoed> {
        Ok(())
    }

    fn leave(&self, phase: Phase, took: Duration) {
        self.log.leave(phase, took);
    }

    fn parent_paused(&self, took: Duration) {
        self.log.parent_paused(took);
    }

    fn forked(&self, point: &Arc<ForkPoint>, clones: &[Arc<Member>]) {
        let fork = Some((point.clone(), clones.to_vec()));
        *self.fork.lock().unwrap_or_else(PoisonError::into_inner) = fork;
        self.start_sampling();
    }
}

/// What the kernel accounts at one instant.
#[derive(Clone, Copy)]
struct Usage {
    anonymous_kib: u64,
    kernel_kib: u64,
}

impl Usage {
    fn now() -> Option<Usage> {
        let own = fs::read_to_string("/proc/self/smaps_rollup").ok()?;
        let host = fs::read_to_string("/proc/meminfo").ok()?;
        let kernel = ["Slab:", "KernelStack:", "PageTables:", "SecPageTables:"];
        Some(Usage {
            anonymous_kib: field(&own, "Anonymous:")?,
            // Older kernels do not have all of them.
            kernel_kib: kernel.iter().filter_map(|name| field(&host, name)).sum(),
        })
    }
}

fn field(text: &str, name: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(name))?;
    value.trim().strip_suffix("kB")?.trim().parse().ok()
}
