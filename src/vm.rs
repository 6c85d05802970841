//! The library's face: a VM that can be forked, and its clones.

use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use forkvm_abi::doorbell::report;
use forkvm_clone_engine::{
    BootSpec, CloneSpec, Family, FamilyConfig, Finished, ForkPoint, Identity, Member, MemberError,
    RewindWay, StartError, Timeline,
};
use forkvm_vmm::{Kvm, KvmError};
use thiserror::Error;

/// A VM of this process.
///
/// It runs until its guest ends it or it is [killed](Vm::kill); dropping the handle does neither.
/// Clones go on without their parent, as processes do.
pub struct Vm {
    pub(crate) family: Arc<Family>,
    pub(crate) member: Arc<Member>,
}

impl Vm {
    /// Boots a VM in a family of its own.
    pub fn boot(spec: BootSpec) -> Result<Vm, Error> {
        Vm::boot_with(spec, FamilyConfig::default())
    }

    /// Boots a VM in a family of its own, with consoles, an observer or another spawner.
    pub fn boot_with(spec: BootSpec, config: FamilyConfig) -> Result<Vm, Error> {
        let family = Family::new(Arc::new(Kvm::open()?), config);
        let member = family.boot(spec)?;
        Ok(Vm { family, member })
    }

    /// Forks it into `spec.count` clones that continue from this very instant. All run, or none and
    /// an error says why; the VM runs on in any case, but for freeze `stop`.
    ///
    /// Clones that fetch each page from the running parent when they first touch it:
    ///
    /// ```no_run
    /// # fn fork(parent: &forkvm::Vm) -> Result<(), forkvm::Error> {
    /// use forkvm::{CloneSpec, MemoryMode};
    ///
    /// let clones = parent.fork(CloneSpec {
    ///     memory_mode: MemoryMode::Lazy,
    ///     ..CloneSpec::new(4)
    /// })?;
    /// clones.iter().for_each(|clone| println!("{}", clone.join().end));
    /// let fetched = parent.family().faults().figures();
    /// println!("{} pages by touch", fetched.pages_by_fault);
    /// # Ok(())
    /// # }
    /// ```
    pub fn fork(&self, spec: CloneSpec) -> Result<Vec<CloneVm>, Error> {
        let ticket = self.member.fork(spec)?;
        Ok(self.adopt(ticket.clones))
    }

    /// Keeps this instant, to [spawn](ForkPoint::spawn) clones from it later.
    pub fn fork_point(&self, spec: CloneSpec) -> Result<Arc<ForkPoint>, Error> {
        Ok(self.member.fork_point(spec)?)
    }

    /// Has `count` shells ready for its clones, and says how many are ready then: a fork that finds its
    /// clones' VMs built takes a fraction of the time. It stands still for a moment. See
    /// [`FamilyConfig::pool`] for a pool that refills itself.
    pub fn fill_pool(&self, count: u32) -> Result<u32, Error> {
        Ok(self.family.fill_pool(&self.member, count)?)
    }

    /// Waits until its guest says that it has done what clones will inherit.
    pub fn wait_ready(&self, deadline: Duration) -> Result<(), Error> {
        Ok(self.member.wait_report(report::READY, 1, deadline)?)
    }

    /// Waits until it has ended and says how.
    pub fn join(&self) -> Finished {
        self.member.wait()
    }

    /// Ends it.
    pub fn kill(&self) {
        self.member.kill();
    }

    /// Who it is.
    pub fn identity(&self) -> Identity {
        self.member.identity()
    }

    /// When it passed the end points of its start.
    pub fn timeline(&self) -> Timeline {
        self.member.timeline()
    }

    /// The engine's handle of it, for everything else.
    pub fn member(&self) -> &Arc<Member> {
        &self.member
    }

    /// All VMs that came of the same boot.
    pub fn family(&self) -> &Arc<Family> {
        &self.family
    }

    fn adopt(&self, clones: Vec<Arc<Member>>) -> Vec<CloneVm> {
        let vm = |member| Vm {
            family: self.family.clone(),
            member,
        };
        clones
            .into_iter()
            .map(|member| CloneVm { vm: vm(member) })
            .collect()
    }
}

/// A clone: a [`Vm`] that came of a fork. Dropping the handle does not end it.
pub struct CloneVm {
    vm: Vm,
}

impl CloneVm {
    /// Its number among the clones of its fork, from 1: what the guest's fork call returned in it.
    pub fn id(&self) -> u32 {
        self.vm.identity().clone_id
    }

    /// Puts it back at its fork point, by the way that this host allows, which is returned: memory,
    /// vCPUs, devices and disks are as in a fresh clone, and its fork call is answered once more. It
    /// keeps its handle, name and id and gets a new generation id; its reports and timeline begin anew.
    /// Clones of its own run on. On an error it runs on as it was, but after
    /// [`RewindError::Broken`](forkvm_clone_engine::RewindError::Broken), with which it ends.
    pub fn rewind(&self) -> Result<RewindWay, Error> {
        self.rewind_by(RewindWay::Auto)
    }

    /// The same by this way; an error where the host does not allow it.
    pub fn rewind_by(&self, way: RewindWay) -> Result<RewindWay, Error> {
        Ok(self.vm.member.rewind(way)?)
    }
}

impl Deref for CloneVm {
    type Target = Vm;

    fn deref(&self) -> &Vm {
        &self.vm
    }
}

/// Why a VM could not be booted or forked.
#[derive(Debug, Error)]
pub enum Error {
    /// KVM cannot be used.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The VM could not be started.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The VM could not do what it was asked.
    #[error(transparent)]
    Member(#[from] MemberError),
}
