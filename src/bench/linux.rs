//! The Linux machine that is measured: the image `minimal`, once its agent has answered. It idles.
//!
//! It is booted and saved once in a run of the laboratory, which takes a minute where KVM is software, and restored for each
//! experiment. Where there is no image, its cases are left out, with the command that builds it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use forkvm_clone_engine::saved::{OpenMachine, SaveTo};
use forkvm_clone_engine::{
    BootSpec, ConsoleDevice, End, Family, FamilyConfig, ForkPoint, FreezeKind, Member, MemoryMode,
    VsockSpec, WorkingSetPolicy,
};
use forkvm_linux_image::Cache;
use forkvm_vmm::Kvm;
use forkvm_vmm::boot::Payload;
use tempfile::TempDir;

use super::measure::{BenchError, call};
use super::setting::{Pool, Setting};
use super::subject::{Trace, Traced, fork_by};
use crate::agent::AgentClient;
use crate::linux::{BOOT, INTRODUCTION, LinuxVm};

/// What is booted.
const IMAGE: &str = "minimal";

/// RAM of the machine in MiB.
pub const MEMORY_MIB: u64 = 64;

/// The machine on disk, from its first use until [`Saved`] is dropped.
static SAVED: Mutex<Option<TempDir>> = Mutex::new(None);

/// Holds on to the machine that was booted, for the scenarios of a run. Dropped, it removes it.
#[derive(Debug, Default)]
pub struct Saved(());

impl Drop for Saved {
    fn drop(&mut self) {
        SAVED.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

/// The saved machine, which is made if it is not there.
fn saved() -> Result<OpenMachine, BenchError> {
    let mut saved = SAVED.lock().unwrap_or_else(PoisonError::into_inner);
    let directory = match &*saved {
        Some(directory) => directory,
        None => saved.insert(boot_and_save()?),
    };
    Ok(OpenMachine::open(&directory.path().join("machine"))?)
}

fn boot_and_save() -> Result<TempDir, BenchError> {
    let lacks = || {
        let text = format!("there is no image {IMAGE}: `forkvm image build {IMAGE}` makes it");
        BenchError::Lacks(text)
    };
    let found = Cache::of_user().and_then(|cache| cache.newest(IMAGE));
    let found = found.map_err(|error| BenchError::Lacks(error.to_string()))?;
    let image = found.ok_or_else(lacks)?;
    let directory = tempfile::tempdir().map_err(call("making a directory"))?;
    let config = FamilyConfig {
        saver: Some(Arc::new(SaveTo::exactly(directory.path().join("machine")))),
        vsock: vsock(&directory),
        ..FamilyConfig::default()
    };
    let boot = BootSpec {
        name: "linux".into(),
        memory_mib: MEMORY_MIB,
        vcpus: 1,
        disks: Vec::new(),
        payload: Payload::Kernel {
            kernel: image.vmlinux(),
            initrd: Some(image.initramfs()),
        },
        cmdline: image.cmdline().to_owned(),
        console: ConsoleDevice::Serial,
    };
    let vm = LinuxVm::boot(boot, config, BOOT)?;
    let saved = vm.member().save();
    vm.family().end();
    saved?;
    match vm.join().end {
        End::Saved => Ok(directory),
        end => Err(BenchError::Ended {
            name: vm.identity().name,
            end,
        }),
    }
}

fn vsock(directory: &TempDir) -> Option<VsockSpec> {
    Some(VsockSpec {
        path: directory.path().join("vsock"),
    })
}

/// See the module's text. Its whole family ends with it.
pub struct LinuxSubject {
    vm: LinuxVm,
    trace: Arc<Trace>,
    pool: Pool,
    _sockets: TempDir,
}

/// A clone that has become itself, and when it was asked for.
pub struct Answered {
    /// The clone.
    pub vm: LinuxVm,
    asked: Instant,
}

impl LinuxSubject {
    /// Restores it, set up as `setting` says.
    pub fn restore(setting: Setting) -> Result<LinuxSubject, BenchError> {
        let machine = saved()?;
        let sockets = tempfile::tempdir().map_err(call("making a directory"))?;
        let trace = Arc::new(Trace::default());
        let config = FamilyConfig {
            vsock: vsock(&sockets),
            ..setting.family(trace.clone(), None, WorkingSetPolicy::Off)?
        };
        let family = Family::new(Arc::new(Kvm::open()?), config);
        let vm = LinuxVm::restore(family.clone(), machine, None, MemoryMode::Cow, &mut |_| {});
        Ok(LinuxSubject {
            vm: vm.inspect_err(|_| family.end())?,
            trace,
            pool: setting.pool,
            _sockets: sockets,
        })
    }

    /// Its agent.
    pub fn agent(&self) -> &AgentClient {
        self.vm.agent()
    }

    /// A fork point of it for clones in `mode`.
    pub fn point(&self, mode: MemoryMode) -> Result<Arc<ForkPoint>, BenchError> {
        Ok(self.vm.fork_point(fork_by(FreezeKind::Auto, mode, 1))?)
    }

    /// Has what is set up before a clone is asked for ready for one.
    pub fn get_ready(&self) -> Result<(), BenchError> {
        self.pool.fill(&self.vm, 1)
    }

    /// One clone of `point`, once its agent has answered.
    pub fn spawn_one(&self, point: &Arc<ForkPoint>) -> Result<Answered, BenchError> {
        let asked = Instant::now();
        let clone = point.spawn(1)?.remove(0);
        self.meet(clone, asked)
    }

    /// A clone of it, once its agent has answered.
    pub fn meet(&self, clone: Arc<Member>, asked: Instant) -> Result<Answered, BenchError> {
        let vm = LinuxVm::meet(self.vm.family().clone(), clone, INTRODUCTION)?;
        Ok(Answered { vm, asked })
    }

    /// Forks it into one clone, which has answered then. Returns the fork point as well, and what the engine did.
    pub fn fork(&self, mode: MemoryMode) -> Result<(Answered, Arc<ForkPoint>, Traced), BenchError> {
        self.trace.take();
        let asked = Instant::now();
        let mut ticket = self.vm.member().fork(fork_by(FreezeKind::Auto, mode, 1))?;
        let clone = self.meet(ticket.clones.remove(0), asked)?;
        Ok((clone, ticket.point, self.trace.take()))
    }
}

impl Answered {
    /// The end points that a clone passes for which nobody rings the doorbell: `first_answer` is its agent's.
    pub fn end_points(&self) -> Vec<(&'static str, Duration)> {
        let seen = self.vm.timeline();
        let answered = Some(self.vm.introduced().at);
        let points = [
            ("built", seen.built),
            ("restored", seen.restored),
            ("first_run", seen.first_run),
            ("first_answer", answered),
        ];
        let since = |at: Instant| at.saturating_duration_since(self.asked);
        points
            .into_iter()
            .filter_map(|(name, at)| Some((name, since(at?))))
            .collect()
    }
}

impl Drop for LinuxSubject {
    fn drop(&mut self) {
        self.vm.family().end();
    }
}
