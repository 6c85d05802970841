//! Clones as VMs of this process.
//!
//! The clone's first instruction comes from here: its memory is a private mapping of the image, its
//! registers are the parent's, and in its copy of the doorbell page stands its own answer.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use forkvm_abi::errno;
use forkvm_devices::DeviceError;
use forkvm_devices::doorbell::{Answer, Doorbell};
use forkvm_vmm::{Backing, ReadyVm};

use super::{Prepared, SpawnError, Spawner};
use crate::attached::Attached;
use crate::fork::ForkError;
use crate::fork_point::ForkPoint;
use crate::identity::Identity;
use crate::member::{Inbox, Life, Member, Origin, Waiting, Witness};
use crate::parked::Parked;
use crate::phase::{self, Observer, Phase};
use crate::pool::Pooled;
use crate::timeline::Timeline;
use crate::vm_memory::{ImageBase, VmMemory};
use crate::vsock::VsockEnd;

/// See the module's text.
#[derive(Debug)]
pub struct InProcess;

impl Spawner for InProcess {
    fn name(&self) -> &'static str {
        "in-process"
    }

    fn spawn(
        &self,
        point: &Arc<ForkPoint>,
        count: u32,
        asked: Instant,
    ) -> Result<Vec<Arc<Member>>, ForkError> {
        point.spawn_prepared(count, |identities, observer| {
            let granted = identities.len() as u32;
            let prepare = |identity: Identity| -> Result<Box<dyn Prepared>, SpawnError> {
                point.family.check_open()?;
                let vsock = point.family.vsock_of(&identity).map_err(no_vsock)?;
                let clone = Unbuilt {
                    identity,
                    granted,
                    asked,
                    witness: None,
                    vsock,
                };
                Ok(Box::new(clone.build(point, observer)?))
            };
            identities.into_iter().map(prepare).collect()
        })
    }
}

/// A clone that is to be built in this process.
pub(crate) struct Unbuilt {
    pub(crate) identity: Identity,
    /// Clones of its fork.
    pub(crate) granted: u32,
    /// When it was asked for.
    pub(crate) asked: Instant,
    /// Who else hears what it shows.
    pub(crate) witness: Option<Arc<dyn Witness>>,
    /// The host's end of its socket device, if it has one.
    pub(crate) vsock: Option<Arc<VsockEnd>>,
}

impl Unbuilt {
    /// Builds it out of `point`.
    pub(crate) fn build(
        self,
        point: &Arc<ForkPoint>,
        observer: &dyn Observer,
    ) -> Result<Waiting, SpawnError> {
        let Unbuilt {
            identity,
            granted,
            asked,
            witness,
            vsock,
        } = self;
        let origin = Origin {
            point: point.clone(),
            identity: identity.clone(),
            granted,
        };
        let inbox = Inbox::of_clone(origin, witness);
        let told = Told {
            identity: &identity,
            granted,
            life: inbox.life(),
            vsock,
        };
        let timeline = Timeline {
            fork_requested: Some(point.requested),
            spawn_requested: Some(asked),
            ..Timeline::default()
        };
        let Furnished {
            vm,
            memory,
            attached,
            timeline,
            thread,
        } = furnish(point, &told, timeline, observer)?;
        let waiting = Waiting::new(&point.family, vm, memory, attached, inbox, timeline, thread);
        Ok(waiting)
    }
}

pub(super) fn no_console(source: io::Error) -> SpawnError {
    SpawnError::Host {
        what: "a console",
        source,
    }
}

pub(super) fn no_vsock(source: io::Error) -> SpawnError {
    SpawnError::Host {
        what: "a socket for its vsock",
        source,
    }
}

/// What a clone is told, where it tells what, and what is its own of the host.
pub(crate) struct Told<'a> {
    pub(crate) identity: &'a Identity,
    /// Clones that the guest's call was granted.
    pub(crate) granted: u32,
    pub(crate) life: &'a Life,
    pub(crate) vsock: Option<Arc<VsockEnd>>,
}

/// A VM at a fork point, with all that belongs to it.
pub(crate) struct Furnished {
    pub(crate) vm: ReadyVm,
    // After the VM: what watches its memory goes last.
    pub(crate) memory: Arc<VmMemory>,
    pub(crate) attached: Attached,
    pub(crate) timeline: Timeline,
    pub(crate) thread: Parked,
}

/// Makes a VM that stands at `point`. Dropped, all of it goes.
pub(crate) fn furnish(
    point: &ForkPoint,
    told: &Told<'_>,
    mut timeline: Timeline,
    observer: &dyn Observer,
) -> Result<Furnished, SpawnError> {
    let family = &point.family;
    let phase = phase::begin(observer, Phase::Spawn, None)?;
    let attached = Attached {
        disks: point.disks.for_clone(),
        vsock: told.vsock.clone(),
    };
    let console = family.config().consoles.open(told.identity);
    let console = console.map_err(no_console)?;
    let peripherals = attached.peripherals(console).map_err(no_vsock)?;
    let Pooled { mut shell, thread } = family.pool().take(&point.state)?;
    timeline.built = Some(Instant::now());
    phase.done();

    let phase = phase::begin(observer, Phase::Memory, None)?;
    let (lose, ram) = (told.life.lose(), shell.ram_mut());
    let image = point.image.clone();
    ram.remap(Backing::Private(Arc::new(ImageBase { image })))?;
    let name = told.identity.name.as_str();
    let memory = VmMemory::of_clone(name, ram, &point.image, family.faults(), lose)?;
    memory.set_brake(shell.brake());
    if let Some(touches) = &point.touches {
        memory.record(touches.clone());
    }
    phase.done();

    let phase = phase::begin(observer, Phase::Restore, None)?;
    let vm = shell.restore(&point.state, peripherals, told.life.event_sink())?;
    timeline.restored = Some(Instant::now());
    phase.done();

    let phase = phase::begin(observer, Phase::Identity, None)?;
    tell(
        &mut vm.doorbell(),
        told.identity,
        point.forker,
        told.granted,
    )?;
    phase.done();
    Ok(Furnished {
        vm,
        memory,
        attached,
        timeline,
        thread,
    })
}

/// Writes into a clone's doorbell page who it is, and answers the calls that its state holds.
pub(crate) fn tell(
    doorbell: &mut Doorbell,
    identity: &Identity,
    forker: Option<u32>,
    granted: u32,
) -> Result<(), DeviceError> {
    doorbell.announce(&identity.announcement())?;
    if let Some(slot) = forker {
        let result = i64::from(identity.clone_id);
        doorbell.answer(
            slot,
            Answer {
                result,
                granted,
                ticket: 0,
            },
        );
    }
    // The other calls are the parent's; here nobody will serve them.
    doorbell.answer_all_pending(-errno::EAGAIN);
    Ok(())
}

impl Prepared for Waiting {
    fn start(self: Box<Self>) -> Result<Arc<Member>, SpawnError> {
        Waiting::start(*self)
    }
}
