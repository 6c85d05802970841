//! Clones as VMs of this process.
//!
//! The clone's first instruction comes from here: its memory is a private mapping of the image, its
//! registers are the parent's, and in its copy of the doorbell page stands its own answer.

use std::sync::Arc;
use std::time::Instant;

use forkvm_abi::errno;
use forkvm_devices::DeviceError;
use forkvm_devices::doorbell::Answer;
use forkvm_vmm::{Backing, Peripherals, Ram, ReadyVm, Shell};

use super::{Prepared, SpawnError, Spawner};
use crate::disks::DiskSource;
use crate::family::Family;
use crate::fork_point::ForkPoint;
use crate::identity::Identity;
use crate::member::{Inbox, Member, Waiting};
use crate::phase::{self, Observer, Phase};
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
        let phase = phase::begin(observer, Phase::Memory, None)?;
        let image = point.image.clone();
        let backing = Backing::Private(Arc::new(ImageBase { image }));
        let mut ram = Ram::map(point.layout.clone(), backing)?;
        let inbox = Inbox::new(identity.clone());
        let (name, lose) = (identity.name.as_str(), inbox.lose());
        let memory = VmMemory::of_clone(name, &mut ram, &point.image, family.faults(), lose)?;
        if let Some(touches) = &point.touches {
            memory.record(touches.clone());
        }
        phase.done();

        let phase = phase::begin(observer, Phase::Spawn, None)?;
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
        let config = point.config().clone();
        let shell = Shell::build(family.kvm(), config, ram, peripherals, inbox.event_sink())?;
        memory.set_brake(shell.brake());
        timeline.built = Some(Instant::now());
        phase.done();

        let phase = phase::begin(observer, Phase::Restore, None)?;
        let mut sections = point.state().reader();
        let vm = shell.restore(&mut sections)?;
        sections.finish()?;
        timeline.restored = Some(Instant::now());
        phase.done();

        let phase = phase::begin(observer, Phase::Identity, None)?;
        tell(&vm, &identity, point.forker, granted)?;
        phase.done();

        Ok(Box::new(Waiting::new(
            family, vm, memory, disks, inbox, timeline,
        )?))
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
