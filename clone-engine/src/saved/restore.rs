//! A VM from a saved machine that is open.

use std::io;
use std::sync::Arc;

use forkvm_abi::errno;
use forkvm_devices::device::GuestOp;
use forkvm_devices::doorbell::Answer;
use forkvm_devices::{DeviceError, SectionError};
use forkvm_vmm::memory_file::{MemoryFile, MemoryFileError, Progress};
use forkvm_vmm::{Backing, MachineState, MemoryError, Ram, ReadyVm, Shell, VmError, memory};
use thiserror::Error;

use super::{IDENTITY, OpenMachine, disk_section};
use crate::attached::Attached;
use crate::family::Family;
use crate::first_pages::FirstPages;
use crate::fork::MemoryMode;
use crate::identity::Identity;
use crate::image::{MemoryImage, OwnerTable, Plan, StoreError};
use crate::member::{Inbox, Member, Waiting};
use crate::parked::Parked;
use crate::source::SourceError;
use crate::source::saved_memory::SavedMemory;
use crate::spawn::SpawnError;
use crate::timeline::Timeline;
use crate::userfault::UserfaultError;
use crate::vm_memory::{ImageBase, VmMemory};
use crate::working_set::Recorder;

impl Family {
    /// Starts a saved machine as the first VM of this family, under `name` or the name that it had.
    ///
    /// With `MemoryMode::Cow` its memory is read whole and every chunk of it checked before anything
    /// runs; `progress` counts its bytes. With `MemoryMode::Lazy` it runs at once: a chunk is read
    /// and checked when it is first touched, and one that is damaged ends the VM then. In the guest, the call that asked for the save answers 1, and every other
    /// call that was under way -EAGAIN: the clones that it may have waited for are not here.
    pub fn restore(
        self: &Arc<Self>,
        machine: OpenMachine,
        name: Option<&str>,
        memory_mode: MemoryMode,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Arc<Member>, RestoreError> {
        let mut sections = machine.sections.reader();
        let state = MachineState::take_from(&mut sections)?;
        let saved: Identity = sections.decode(IDENTITY)?;
        for disk in &state.config().disks {
            sections.take(&disk_section(&disk.name))?;
        }
        sections.finish()?;
        let layout = state.layout().clone();
        machine.memory.check_len(layout.len())?;
        let mut identity =
            Identity::root(name.unwrap_or(&saved.name)).map_err(RestoreError::Identity)?;
        identity.fork_count = saved.fork_count;
        let has = state.config().vsock;
        if has != self.config().vsock.is_some() {
            return Err(RestoreError::VsockWanted { has });
        }
        let identity = self.addressed(identity);

        let inbox = Inbox::new(identity.clone(), None);
        let (ram, memory) = match memory_mode {
            MemoryMode::Cow => {
                let file = memory::memfd(c"forkvm-ram", layout.len())?;
                machine.memory.load_into(&file, progress)?;
                let mut ram = Ram::map(layout, Backing::Shared(Arc::new(file)))?;
                let memory =
                    VmMemory::new(&identity.name, &mut ram, self.faults(), inbox.life().lose());
                (ram, memory)
            }
            MemoryMode::Lazy => {
                let image = self.image_of_saved(machine.memory, &state)?;
                let base = ImageBase {
                    image: image.clone(),
                };
                let mut ram = Ram::map(layout, Backing::Private(Arc::new(base)))?;
                let (name, lose) = (identity.name.as_str(), inbox.life().lose());
                let memory = VmMemory::of_clone(name, &mut ram, &image, self.faults(), lose)?;
                if self.faults().replays() {
                    memory.record(Recorder::after(&machine.working_set));
                    self.faults().replay(&image, machine.working_set);
                }
                self.faults().fill_in_background(&image);
                (ram, memory)
            }
        };
        let console = self
            .config()
            .consoles
            .open(&identity)
            .map_err(RestoreError::Console)?;
        let attached = Attached {
            disks: machine.disks,
            vsock: self.vsock_of(&identity).map_err(RestoreError::Vsock)?,
        };
        let peripherals = attached.peripherals(console).map_err(RestoreError::Vsock)?;
        let shell = Shell::build(self.kvm(), state.config().vcpus, ram)?;
        memory.set_brake(shell.brake());
        let vm = shell.restore(&state, peripherals, inbox.life().event_sink())?;
        tell(&vm, &identity)?;
        let thread = Parked::new().map_err(RestoreError::Thread)?;
        let timeline = Timeline::default();
        let waiting = Waiting::new(self, vm, memory, attached, inbox, timeline, thread);
        Ok(waiting.start()?)
    }

    /// An image that fills from a memory file.
    fn image_of_saved(
        &self,
        memory: MemoryFile,
        state: &MachineState,
    ) -> Result<Arc<MemoryImage>, RestoreError> {
        let len = state.layout().len();
        let source = SavedMemory::new(memory);
        let table = OwnerTable::own(len, &source.data());
        let empty = self.faults().empty_image(len)?;
        let image = self.faults().image_of(empty, table, Arc::new(source));
        self.keep_account_of(&image);
        image.publish(Plan::whole(len))?;
        let first_pages = FirstPages {
            state,
            doorbell: state.doorbell_page()?,
        };
        first_pages.bring(&image)?;
        Ok(image)
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
    /// Memory that it needs from the start cannot be had.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// No image for its memory.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Its page faults cannot be served.
    #[error(transparent)]
    Userfault(#[from] UserfaultError),
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
    /// No thread to serve it.
    #[error("the host allows no more threads, see `ulimit -u`")]
    Thread(#[source] io::Error),
    /// No console.
    #[error("opening the VM's console failed")]
    Console(#[source] io::Error),
    /// No socket for its socket device.
    #[error("opening the VM's vsock failed")]
    Vsock(#[source] io::Error),
    /// It was saved with a socket device and is to be started without one, or the other way round.
    #[error(
        "the machine was saved {} a vsock, so it is restored {} `--vsock`",
        if *.has { "with" } else { "without" }, if *.has { "with" } else { "without" }
    )]
    VsockWanted {
        /// Whether it has one.
        has: bool,
    },
}
