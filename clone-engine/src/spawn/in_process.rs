//! Clones as VMs of this process.
//!
//! The clone's first instruction comes from here: its memory is a private mapping of the image, its
//! registers are the parent's, and in its copy of the doorbell page stands its own answer.

use std::sync::Arc;
use std::time::Instant;

use forkvm_abi::errno;
use forkvm_devices::DeviceError;
use forkvm_devices::doorbell::Answer;
use forkvm_vmm::{Backing, Peripherals, ReadyVm};

use super::{Prepared, SpawnError, Spawner};
use crate::disks::DiskSource;
use crate::family::Family;
use crate::fork_point::ForkPoint;
use crate::identity::Identity;
use crate::member::{Inbox, Member, Waiting};
use crate::phase::{self, Observer, Phase};
use crate::pool::Pooled;
use crate::timeline::Timeline;
use crate::vm_memory::{ImageBase, VmMemory};

/// See the module's text.
#[derive(Debug)]
pub struct InProcess;

impl Spawner for InProcess {
    fn name(&self) -> &'static str {
        "in-process"
    }

    fn prepare(
        &self,
        family: &Arc<Family>,
        point: &ForkPoint,
        identity: Identity,
        granted: u32,
        observer: &dyn Observer,
    ) -> Result<Box<dyn Prepared>, SpawnError> {
        let mut timeline = Timeline {
            fork_requested: Some(point.requested),
            spawn_requested: Some(Instant::now()),
            ..Timeline::default()
        };
        let phase = phase::begin(observer, Phase::Spawn, None)?;
        let inbox = Inbox::new(identity.clone());
        let disks = point.disks.for_clone();
        let console = family.config().consoles.open(&identity);
        let console = console.map_err(|source| SpawnError::Host {
            what: "a console",
            source,
        })?;
        let peripherals = Peripherals {
            console,
            disks: disks.iter().map(DiskSource::layer).collect(),
        };
        let Pooled { mut shell, thread } = family.pool().take(&point.state)?;
        timeline.built = Some(Instant::now());
        phase.done();

        let phase = phase::begin(observer, Phase::Memory, None)?;
        let (name, lose, ram) = (identity.name.as_str(), inbox.lose(), shell.ram_mut());
        let image = point.image.clone();
        ram.remap(Backing::Private(Arc::new(ImageBase { image })))?;
        let memory = VmMemory::of_clone(name, ram, &point.image, family.faults(), lose)?;
        memory.set_brake(shell.brake());
        phase.done();

        let phase = phase::begin(observer, Phase::Restore, None)?;
        let vm = shell.restore(&point.state, peripherals, inbox.event_sink())?;
        timeline.restored = Some(Instant::now());
        phase.done();

        let phase = phase::begin(observer, Phase::Identity, None)?;
        tell(&vm, &identity, point.forker, granted)?;
        phase.done();

        let waiting = Waiting::new(family, vm, memory, disks, inbox, timeline, thread);
        Ok(Box::new(waiting))
    }
}

/// Writes into the clone's doorbell page who it is, and answers the calls that its state holds.
fn tell(
    vm: &ReadyVm,
    identity: &Identity,
    forker: Option<u32>,
    granted: u32,
) -> Result<(), DeviceError> {
    let mut doorbell = vm.doorbell();
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
