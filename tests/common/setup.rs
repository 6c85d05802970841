//! How a test builds its VM, and what it asks of the host before.

use std::env;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use forkvm::engine::saved::Saver;
use forkvm::engine::source::Sources;
use forkvm::engine::spawn::Spawner;
use forkvm::engine::spawn::in_process::InProcess;
use forkvm::engine::{
    Consoles, ForkLog, Member, NoObserver, Observer, Phase, PoolConfig, Vetoed, WorkingSetPolicy,
};
use forkvm::vmm::PausedVm;
use forkvm::{
    BootSpec, CloneSpec, ConsoleDevice, DiskSource, DiskSpec, FamilyConfig, FaultConfig, ForkPoint,
    FreezeKind, MemoryMode, Process, ProcessConfig, Vm, WorkerProgram, guest,
};

use super::{Guest, Kept};

/// Returns from a test that needs KVM on a host that has none, and says so.
macro_rules! need_kvm {
    () => {
        if !$crate::common::has_kvm() {
            println!("skipped: this host has no /dev/kvm");
            return;
        }
    };
}
pub(crate) use need_kvm;

/// Whether there is a KVM to test. One that is there and cannot be used fails the test.
pub fn has_kvm() -> bool {
    Path::new("/dev/kvm").exists()
}

/// `full`, or `small` where everything takes fifty times as long (docs/testing.md).
pub fn scaled(full: u32, small: u32) -> u32 {
    if full_scale() { full } else { small }
}

/// Whether counts and sizes are what they should be, rather than what a slow host can do.
pub fn full_scale() -> bool {
    env::var_os("FORKVM_TEST_SCALE").is_none_or(|scale| scale != "small")
}

/// A fork into `count` clones by this freeze and memory mode.
pub fn fork_by(freeze: FreezeKind, memory_mode: MemoryMode, count: u32) -> CloneSpec {
    CloneSpec {
        freeze,
        memory_mode,
        ..CloneSpec::new(count)
    }
}

/// Where the clones of tests live that do not care, if not in the test's own process: `process`.
const SPAWNER: &str = "FORKVM_TEST_SPAWNER";

/// Shells that wait for the clones of tests that do not care; none by default.
const POOL: &str = "FORKVM_TEST_POOL";

/// What tests leave to whoever runs them.
pub fn as_tests_are_to_run() -> FamilyConfig {
    let mut config = FamilyConfig::default();
    match env::var(SPAWNER).as_deref() {
        Ok("process") => config.spawner = workers(),
        Ok(word) => panic!("{SPAWNER}={word}: only process is known"),
        Err(_) => {}
    }
    if let Ok(shells) = env::var(POOL) {
        let shells = shells.parse().expect("a number of shells");
        config.pool = PoolConfig { shells };
    }
    config
}

/// The command, as a worker.
pub fn worker_program() -> WorkerProgram {
    WorkerProgram {
        path: env!("CARGO_BIN_EXE_forkvm").into(),
        args: vec!["worker".into()],
    }
}

/// A spawner with two workers.
pub fn workers() -> Arc<Process> {
    workers_of(2, 64)
}

/// A spawner with `ready` workers, and more of them where one would run more than so many clones.
pub fn workers_of(ready: usize, clones_per_worker: u32) -> Arc<Process> {
    let config = ProcessConfig {
        ready,
        clones_per_worker,
        ..ProcessConfig::new(worker_program())
    };
    Arc::new(Process::start(config).unwrap())
}

type Hook = dyn Fn(Phase, Option<&PausedVm<'_>>) -> Result<(), Vetoed> + Send + Sync;

/// A VM of the embedded guest that is to be booted: 64 MiB and one vCPU, unless it is told.
pub struct Setup {
    spec: BootSpec,
    config: FamilyConfig,
    consoles: Kept,
    log: Arc<ForkLog>,
}

impl Setup {
    /// With the command line `cmdline`, which names the job.
    pub fn new(cmdline: impl Into<String>) -> Setup {
        let (consoles, log) = (Kept::default(), Arc::new(ForkLog::default()));
        let spec = BootSpec {
            name: "vm".into(),
            memory_mib: 64,
            vcpus: 1,
            disks: Vec::new(),
            payload: guest::bare(),
            cmdline: cmdline.into(),
            console: ConsoleDevice::Serial,
        };
        let config = FamilyConfig {
            consoles: Arc::new(consoles.clone()),
            observer: log.clone(),
            ..as_tests_are_to_run()
        };
        Setup {
            spec,
            config,
            consoles,
            log,
        }
    }

    /// Called so in place of `vm`.
    pub fn name(mut self, name: &str) -> Setup {
        self.spec.name = name.into();
        self
    }

    /// Where its clones live.
    pub fn spawner(mut self, spawner: Arc<dyn Spawner>) -> Setup {
        self.config.spawner = spawner;
        self
    }

    /// Its clones live in this process, wherever those of other tests do: what is looked at is here.
    pub fn here(self) -> Setup {
        self.spawner(Arc::new(InProcess))
    }

    /// Where it and its clones are saved.
    pub fn saver(mut self, saver: impl Saver + 'static) -> Setup {
        self.config.saver = Some(Arc::new(saver));
        self
    }

    pub fn memory_mib(mut self, mib: u64) -> Setup {
        self.spec.memory_mib = mib;
        self
    }

    pub fn vcpus(mut self, vcpus: u32) -> Setup {
        self.spec.vcpus = vcpus;
        self
    }

    /// One more disk.
    pub fn disk(mut self, source: DiskSource) -> Setup {
        let name = format!("disk{}", self.spec.disks.len());
        self.spec.disks.push(DiskSpec { name, source });
        self
    }

    /// `hook` is called at the beginning of each phase, and may fail it.
    pub fn hook(
        mut self,
        hook: impl Fn(Phase, Option<&PausedVm<'_>>) -> Result<(), Vetoed> + Send + Sync + 'static,
    ) -> Setup {
        self.config.observer = Arc::new(Hooked {
            log: self.log.clone(),
            hook: Box::new(hook),
        });
        self
    }

    /// Who watches forks, in place of the log.
    pub fn observer(mut self, observer: impl Observer + 'static) -> Setup {
        self.config.observer = Arc::new(observer);
        self
    }

    /// Keeps no log of forks, which would hold all clones that ever were.
    pub fn unlogged(mut self) -> Setup {
        self.config.observer = Arc::new(NoObserver);
        self
    }

    /// How forks that the guest asks for are done.
    pub fn guest_forks(mut self, spec: CloneSpec) -> Setup {
        self.config.guest_forks = spec;
        self
    }

    /// How page faults of lazy memory are served.
    pub fn faults(mut self, faults: FaultConfig) -> Setup {
        self.config.faults = faults;
        self
    }

    /// Shells that are kept ready for clones.
    pub fn pool(mut self, shells: u32) -> Setup {
        self.config.pool = PoolConfig { shells };
        self
    }

    /// Nothing fills images in the background, and no working set is replayed. What clones touch and parents write does, and
    /// the first pages of a clone, and readahead.
    pub fn no_copier(self) -> Setup {
        self.faults(FaultConfig {
            background: None,
            working_set: WorkingSetPolicy::Off,
            ..FaultConfig::default()
        })
    }

    /// What stands between images and where their pages come from.
    pub fn sources(mut self, sources: impl Sources + 'static) -> Setup {
        self.config.sources = Some(Arc::new(sources));
        self
    }

    /// Other consoles than those that the test can read.
    pub fn consoles(mut self, consoles: impl Consoles + 'static) -> Setup {
        self.config.consoles = Arc::new(consoles);
        self
    }

    pub fn boot(self) -> Guest {
        let vm = Vm::boot_with(self.spec, self.config).unwrap();
        Guest {
            vm,
            consoles: self.consoles,
            log: self.log,
        }
    }
}

/// Keeps the log and calls the test's hook.
struct Hooked {
    log: Arc<ForkLog>,
    hook: Box<Hook>,
}

impl Observer for Hooked {
    fn enter(&self, phase: Phase, paused: Option<&PausedVm<'_>>) -> Result<(), Vetoed> {
        self.log.enter(phase, paused)?;
        (self.hook)(phase, paused)
    }

    fn leave(&self, phase: Phase, took: Duration) {
        self.log.leave(phase, took);
    }

    fn parent_paused(&self, took: Duration) {
        self.log.parent_paused(took);
    }

    fn forked(&self, point: &Arc<ForkPoint>, clones: &[Arc<Member>]) {
        self.log.forked(point, clones);
    }
}
