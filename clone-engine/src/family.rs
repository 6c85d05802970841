//! A family: all VMs that came of one, and what they have in common.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use forkvm_vmm::Kvm;
use thiserror::Error;

use crate::fault::{FaultConfig, FaultHandler};
use crate::fork::CloneSpec;
use crate::handed_out::HandedOut;
use crate::identity::Identity;
use crate::image::{ImageName, MemoryImage};
use crate::member::{Member, MemberError};
use crate::phase::{NoObserver, Observer};
use crate::pool::{Pool, PoolConfig, PoolError};
use crate::saved::Saver;
use crate::source::Sources;
use crate::spawn::in_process::InProcess;
use crate::spawn::{SpawnError, Spawner};
use crate::vsock::{Cids, VsockEnd, VsockSpec};

/// Gives each VM of a family its serial console.
pub trait Consoles: Send + Sync {
    /// Where the output of `vm` goes. Called before the VM runs.
    fn open(&self, vm: &Identity) -> io::Result<Box<dyn Write + Send>>;
}

/// Throws away what guests print.
#[derive(Debug)]
pub struct NoConsoles;

impl Consoles for NoConsoles {
    fn open(&self, _vm: &Identity) -> io::Result<Box<dyn Write + Send>> {
        Ok(Box::new(io::sink()))
    }
}

/// What the VMs of a family have in common.
#[derive(Clone)]
pub struct FamilyConfig {
    /// Where consoles go.
    pub consoles: Arc<dyn Consoles>,
    /// Who watches forks.
    pub observer: Arc<dyn Observer>,
    /// Who makes clones.
    pub spawner: Arc<dyn Spawner>,
    /// How a fork that a guest asks for is done; its count is the guest's.
    pub guest_forks: CloneSpec,
    /// The same for a guest whose VM still maps its memory shared, one that was booted and never
    /// remapped: freeze `delta` does not go with it. Without it, as `guest_forks` says.
    pub guest_forks_while_shared: Option<CloneSpec>,
    /// How many shells wait for clones.
    pub pool: PoolConfig,
    /// How page faults of lazy memory are served.
    pub faults: FaultConfig,
    /// What stands between images and the sources of their pages; nothing by default.
    pub sources: Option<Arc<dyn Sources>>,
    /// Where its socket devices meet the host; without it its VMs have none.
    pub vsock: Option<VsockSpec>,
    /// Where a machine is saved; without it a guest's SAVE is not offered.
    pub saver: Option<Arc<dyn Saver>>,
}

impl Default for FamilyConfig {
    fn default() -> FamilyConfig {
        FamilyConfig {
            consoles: Arc::new(NoConsoles),
            observer: Arc::new(NoObserver),
            spawner: Arc::new(InProcess),
            guest_forks: CloneSpec::default(),
            guest_forks_while_shared: None,
            pool: PoolConfig::default(),
            faults: FaultConfig::default(),
            sources: None,
            vsock: None,
            saver: None,
        }
    }
}

/// See the module's text. Clones outlive their parent, as processes do; [`Family::end`] ends all.
pub struct Family {
    kvm: Arc<Kvm>,
    config: FamilyConfig,
    running: Mutex<Running>,
    pool: Pool,
    faults: FaultHandler,
    /// What VMs of it map or may come to map.
    images: Mutex<Vec<Weak<MemoryImage>>>,
    pub(crate) handed_out: HandedOut,
    cids: Cids,
}

#[derive(Default)]
struct Running {
    /// In the order of their start.
    members: Vec<Arc<Member>>,
    /// Nobody enters any more.
    ending: bool,
}

impl Family {
    /// A family without a member.
    pub fn new(kvm: Arc<Kvm>, config: FamilyConfig) -> Arc<Family> {
        let faults = FaultHandler::new(config.faults, config.sources.clone());
        Arc::new(Family {
            pool: Pool::new(kvm.clone(), config.pool),
            kvm,
            faults,
            config,
            running: Mutex::default(),
            images: Mutex::default(),
            handed_out: HandedOut::default(),
            cids: Cids::default(),
        })
    }

    /// What its VMs have in common.
    pub fn config(&self) -> &FamilyConfig {
        &self.config
    }

    /// What serves the page faults of its VMs.
    pub fn faults(&self) -> &FaultHandler {
        &self.faults
    }

    /// The shells that wait for its clones.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Has `count` shells ready for clones of `member`, a VM of this family, which stands still for a
    /// moment to show its state. Returns how many are ready then. As
    /// [`ForkPoint::fill_pool`](crate::ForkPoint::fill_pool), before the first fork.
    pub fn fill_pool(&self, member: &Member, count: u32) -> Result<u32, MemberError> {
        let state = member.with_paused(|paused| paused.save())?;
        let shells = state
            .map_err(|error| SpawnError::from(PoolError::from(error)))
            .and_then(|state| self.config.spawner.fill(self, &Arc::new(state), count));
        shells.map_err(MemberError::Shells)
    }

    /// The same VM, with a CID of its own if the VMs of this family have any.
    pub(crate) fn addressed(&self, identity: Identity) -> Identity {
        let cid = self.config.vsock.as_ref().map(|_| self.cids.next());
        Identity { cid, ..identity }
    }

    /// The host's end of the socket device of `vm`, if the VMs of this family have any.
    pub(crate) fn vsock_of(&self, vm: &Identity) -> io::Result<Option<Arc<VsockEnd>>> {
        let open = |spec| Ok(Arc::new(VsockEnd::open(spec, vm)?));
        self.config.vsock.as_ref().map(open).transpose()
    }

    pub(crate) fn kvm(&self) -> &Arc<Kvm> {
        &self.kvm
    }

    fn lock(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `member` runs from now on; an error when the family is being ended.
    pub(crate) fn enter(&self, member: &Arc<Member>) -> Result<(), Ending> {
        let mut running = self.lock();
        if running.ending {
            return Err(Ending);
        }
        running.members.push(member.clone());
        Ok(())
    }

    pub(crate) fn leave(&self, member: &Arc<Member>) {
        self.lock()
            .members
            .retain(|other| !Arc::ptr_eq(other, member));
    }

    /// Whether forks may begin.
    pub(crate) fn check_open(&self) -> Result<(), Ending> {
        if self.lock().ending {
            Err(Ending)
        } else {
            Ok(())
        }
    }

    /// `image` holds memory of its VMs from now on.
    pub(crate) fn keep_account_of(&self, image: &Arc<MemoryImage>) {
        let mut images = self.images.lock().unwrap_or_else(PoisonError::into_inner);
        images.retain(|image| image.strong_count() > 0);
        let image = Arc::downgrade(image);
        if !images.iter().any(|known| known.ptr_eq(&image)) {
            images.push(image);
        }
    }

    /// The images that hold memory of its VMs.
    pub(crate) fn images(&self) -> Vec<Arc<MemoryImage>> {
        let images = self.images.lock().unwrap_or_else(PoisonError::into_inner);
        images.iter().filter_map(Weak::upgrade).collect()
    }

    /// The image of this name, if it is one of them.
    pub(crate) fn image(&self, name: ImageName) -> Option<Arc<MemoryImage>> {
        let images = self.images.lock().unwrap_or_else(PoisonError::into_inner);
        let mut images = images.iter().filter_map(Weak::upgrade);
        images.find(|image| image.name() == name)
    }

    /// The VMs that run now.
    pub fn running(&self) -> Vec<Arc<Member>> {
        self.lock().members.clone()
    }

    /// Ends every VM and waits for it: the deepest clones first, the one that was booted last, so
    /// that none outlives what it came of. From its call on nothing is forked any more: a parent that
    /// replaces workers which end finds itself refused (-EBUSY), and its own end coming.
    pub fn end(&self) {
        self.lock().ending = true;
        loop {
            let running = self.running();
            let Some(deepest) = running.iter().map(|member| member.identity().depth).max() else {
                return;
            };
            let layer = running
                .iter()
                .filter(|member| member.identity().depth == deepest);
            layer.clone().for_each(|member| member.kill());
            layer.for_each(|member| {
                member.wait();
            });
        }
    }
}

/// The family is being ended.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("the family is being ended: nothing is started in it any more")]
pub struct Ending;
