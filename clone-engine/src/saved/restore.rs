//! A VM from a saved machine that is open.

use std::io;
use std::sync::Arc;

use forkvm_abi::errno;
use forkvm_devices::device::GuestOp;
use forkvm_devices::doorbell::Answer;
use forkvm_devices::{DeviceError, SectionError};
use forkvm_vmm::memory_file::{MemoryFileError, Progress};
use forkvm_vmm::{MemoryError, MemoryLayout, Peripherals, Ram, ReadyVm, Shell, VmError};
use thiserror::Error;

use super::{IDENTITY, OpenMachine, disk_section};
use crate::disks::DiskSource;
use crate::family::Family;
use crate::identity::Identity;
use crate::member::{Inbox, Member, Waiting};
use crate::spawn::SpawnError;
use crate::timeline::Timeline;

impl Family {
    /// Starts a saved machine as the first VM of this family, under `name` or the name that it had.
    ///
    /// Its memory is read whole and every chunk of it checked before anything runs; `progress`
    /// counts its bytes. In the guest, the call that asked for the save answers 1, and every other
    /// call that was under way -EAGAIN: the clones that it may have waited for are not here.
    pub fn restore(
        self: &Arc<Self>,
        machine: OpenMachine,
        name: Option<&str>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Arc<Member>, RestoreError> {
        let config = machine.config()?;
        let layout = MemoryLayout::new(config.memory_mib)?;
        machine.memory.check_len(layout.len())?;
        let mut sections = machine.sections.reader();
        let saved: Identity = sections.decode(IDENTITY)?;
        for disk in &config.disks {
            sections.take(&disk_section(&disk.name))?;
        }
        let mut identity =
            Identity::root(name.unwrap_or(&saved.name)).map_err(RestoreError::Identity)?;
        identity.fork_count = saved.fork_count;

        let ram = Ram::new(layout)?;
        machine.memory.load_into(ram.backing().file(), progress)?;
        let console = self
            .config()
            .consoles
            .open(&identity)
            .map_err(RestoreError::Console)?;
        let layers = machine.disks.iter().map(DiskSource::layer).collect();
        let peripherals = Peripherals {
            console,
            disks: layers,
        };
        let inbox = Inbox::new(identity.clone());
        let shell = Shell::build(self.kvm(), config, ram, peripherals, inbox.event_sink())?;
        let vm = shell.restore(&mut sections)?;
        sections.finish()?;
        tell(&vm, &identity)?;
        let disks = machine.disks;
        Ok(Waiting::new(self, vm, disks, inbox, Timeline::default())?.start()?)
    }
}

/// Tells the guest who it is, and answers the calls that its state holds.
fn tell(vm: &ReadyVm, identity: &Identity) -> Result<(), DeviceError> {
    let mut doorbell = vm.doorbell();
    doorbell.announce(&identity.announcement())?;
    for call in doorbell.pending() {
        if call.op == GuestOp::Save {
            doorbell.answer(call.slot, Answer::of(1));
        }
    }
    doorbell.answer_all_pending(-errno::EAGAIN);
    Ok(())
}

/// Why a saved machine was not started.
#[derive(Debug, Error)]
pub enum RestoreError {
    /// A section is missing, cannot be decoded, or belongs to nothing.
    #[error(transparent)]
    Section(#[from] SectionError),
    /// No memory for it.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Its memory is damaged, or of another machine.
    #[error(transparent)]
    MemoryFile(#[from] MemoryFileError),
    /// The VM could not be built or restored; on another kind of host, for one.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The guest could not be told who it is.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// It could not be let go.
    #[error(transparent)]
    Start(#[from] SpawnError),
    /// No random bytes for its identity.
    #[error("reading random bytes for the VM's identity failed")]
    Identity(#[source] io::Error),
    /// No console.
    #[error("opening the VM's console failed")]
    Console(#[source] io::Error),
}
