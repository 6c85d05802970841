//! The first VM of a family: booted from a payload.

use std::io;
use std::sync::Arc;

use forkvm_abi::doorbell::feature;
use forkvm_vmm::boot::Payload;
use forkvm_vmm::{DiskConfig, MemoryError, MemoryLayout, Ram, Shell, VmConfig, VmError};
use thiserror::Error;

use crate::attached::Attached;
use crate::disks::DiskSource;
use crate::family::Family;
use crate::identity::Identity;
use crate::member::{Inbox, Member, Waiting};
use crate::parked::Parked;
use crate::spawn::SpawnError;
use crate::timeline::Timeline;
use crate::vm_memory::VmMemory;

/// A disk of a VM that is to be booted.
#[derive(Clone)]
pub struct DiskSpec {
    /// Its name, unique in the machine, at most 20 bytes; the guest reads it as serial number.
    pub name: String,
    /// Where it is kept.
    pub source: DiskSource,
}

/// What to boot.
#[derive(Clone)]
pub struct BootSpec {
    /// Name of the VM; its clones are `name.1`, `name.2`, ….
    pub name: String,
    /// RAM in MiB.
    pub memory_mib: u64,
    /// vCPUs, 1 to 16.
    pub vcpus: u32,
    /// Disks, at most 8.
    pub disks: Vec<DiskSpec>,
    /// What runs in it.
    pub payload: Payload,
    /// Its command line.
    pub cmdline: String,
    /// Where it reads what is typed.
    pub console: ConsoleDevice,
}

/// Devices that can be a machine's console. What a guest prints by any of them is shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ConsoleDevice {
    /// The serial console alone, which each machine has: a 16550 UART, an exit for each byte.
    #[default]
    Serial,
    /// A virtio console beside it (virtio 1.2 section 5.3), an exit for each line: `console=hvc0` for Linux.
    Virtio,
}

impl Family {
    /// Boots a VM.
    pub fn boot(self: &Arc<Self>, spec: BootSpec) -> Result<Arc<Member>, StartError> {
        let mut config = VmConfig::new(spec.memory_mib, spec.vcpus);
        if self.config().saver.is_some() {
            config.doorbell_features |= feature::SAVE;
        }
        config.disks = spec.disks.iter().map(DiskSpec::config).collect();
        config.vsock = self.config().vsock.is_some();
        config.virtio_console = spec.console == ConsoleDevice::Virtio;
        let identity = Identity::root(&spec.name).map_err(StartError::Identity)?;
        let identity = self.addressed(identity);
        let attached = Attached {
            disks: spec.disks.into_iter().map(|disk| disk.source).collect(),
            vsock: self.vsock_of(&identity).map_err(StartError::Vsock)?,
        };
        let mut ram = Ram::new(MemoryLayout::new(spec.memory_mib)?)?;
        let console = self
            .config()
            .consoles
            .open(&identity)
            .map_err(StartError::Console)?;
        let peripherals = attached.peripherals(console).map_err(StartError::Vsock)?;
        let inbox = Inbox::new(identity.clone(), None);
        let memory = VmMemory::new(&identity.name, &mut ram, self.faults(), inbox.life().lose());
        let shell = Shell::build(self.kvm(), config.vcpus, ram)?;
        memory.set_brake(shell.brake());
        let (events, payload) = (inbox.life().event_sink(), &spec.payload);
        let vm = shell.boot(config, peripherals, events, payload, &spec.cmdline)?;
        vm.doorbell()
            .announce(&identity.announcement())
            .map_err(VmError::from)?;
        let thread = Parked::new().map_err(StartError::Thread)?;
        let timeline = Timeline::default();
        let waiting = Waiting::new(self, vm, memory, attached, inbox, timeline, thread);
        Ok(waiting.start()?)
    }
}

impl DiskSpec {
    fn config(&self) -> DiskConfig {
        let (name, len) = (self.name.clone(), self.source.layer().len());
        DiskConfig {
            name,
            len,
            read_only: self.source.read_only(),
        }
    }
}

/// Why a VM could not be started.
#[derive(Debug, Error)]
pub enum StartError {
    /// No memory for it.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The VM could not be built or booted.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// It could not be let go.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
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
}
