//! The machine around the vCPUs: its configuration, its devices and where each sits.
//!
//! Places are fixed (`forkvm_abi`), so a restored machine is built exactly like a fresh one. A
//! device is added in [`Machine::build`], by one line.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use forkvm_abi::{
    EXIT_PORT, EXIT_PORT_LEN, MAX_VCPUS, SERIAL_GSI, SERIAL_PORT, SERIAL_PORT_LEN, doorbell, slot,
};
use forkvm_devices::block::BlockLayer;
use forkvm_devices::bus::{BusError, SharedDevice};
use forkvm_devices::doorbell::Doorbell;
use forkvm_devices::exit::ExitDevice;
use forkvm_devices::serial::Serial;
use forkvm_devices::virtio::blk::Blk;
use forkvm_devices::virtio::console::Console;
use forkvm_devices::virtio::mmio::MmioTransport;
use forkvm_devices::virtio::rng::Rng;
use forkvm_devices::{Brake, Bus, Device, DeviceError, GuestMemory, InterruptLine, SavedState};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::vsock::{MachineVsock, VsockHost};

/// What a machine is, apart from its content. Section `config` of its state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmConfig {
    /// RAM in MiB, [`MIN_MIB`](crate::memory::MIN_MIB) to [`MAX_MIB`](crate::memory::MAX_MIB).
    pub memory_mib: u64,
    /// vCPUs, 1 to 16.
    pub vcpus: u32,
    /// Its disks, in the order of their slots; at most 8.
    pub disks: Vec<DiskConfig>,
    /// Bits of [`doorbell::feature`] that the doorbell offers.
    pub doorbell_features: u32,
    /// Whether it has a socket device.
    #[serde(default, skip_serializing_if = "is_absent")]
    pub vsock: bool,
    /// Whether it has a virtio console beside the serial one.
    #[serde(default, skip_serializing_if = "is_absent")]
    pub virtio_console: bool,
}

/// Whether a device that not every machine has is left out, also of a state: those without it are as
/// they were before it was known.
fn is_absent(device: &bool) -> bool {
    !device
}

impl SavedState for VmConfig {
    /// Also the version of the machine's layout: a device that moves raises it.
    const VERSION: u16 = 1;
}

impl VmConfig {
    /// A machine without disks, whose doorbell can fork, join and discard.
    pub fn new(memory_mib: u64, vcpus: u32) -> VmConfig {
        let doorbell_features = doorbell::feature::FORK
            | doorbell::feature::JOIN
            | doorbell::feature::INTERRUPT
            | doorbell::feature::DISCARD;
        VmConfig {
            memory_mib,
            vcpus,
            disks: Vec::new(),
            doorbell_features,
            vsock: false,
            virtio_console: false,
        }
    }

    pub(crate) fn check_vcpus(vcpus: u32) -> Result<(), MachineError> {
        if (1..=MAX_VCPUS).contains(&vcpus) {
            Ok(())
        } else {
            Err(MachineError::Vcpus { asked: vcpus })
        }
    }

    pub(crate) fn check(&self) -> Result<(), MachineError> {
        VmConfig::check_vcpus(self.vcpus)?;
        if self.disks.len() > slot::DISKS as usize {
            return Err(MachineError::Disks {
                asked: self.disks.len(),
            });
        }
        for (index, disk) in self.disks.iter().enumerate() {
            if disk.name.is_empty() || disk.name.len() > DISK_NAME_LEN {
                return Err(MachineError::DiskName {
                    disk: disk.name.clone(),
                });
            }
            if self.disks[..index]
                .iter()
                .any(|other| other.name == disk.name)
            {
                return Err(MachineError::DiskTwice {
                    disk: disk.name.clone(),
                });
            }
        }
        Ok(())
    }
}

/// Longest name of a disk in bytes: its serial number (virtio 1.2 section 5.2.6).
const DISK_NAME_LEN: usize = 20;

/// A disk as the guest sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskConfig {
    /// Its name, unique in the machine; the guest reads it as the disk's serial number (at most 20
    /// bytes).
    pub name: String,
    /// Bytes, a multiple of 512.
    pub len: u64,
    /// Whether the guest may not write to it.
    pub read_only: bool,
}

/// What a machine is connected to on the host.
pub struct Peripherals {
    /// Where the output of its consoles goes.
    pub console: Box<dyn Write + Send>,
    /// What is behind each of [`VmConfig::disks`], in the same order.
    pub disks: Vec<Arc<dyn BlockLayer>>,
    /// What the socket device meets on the host, if [`VmConfig::vsock`] says that there is one.
    pub vsock: Option<VsockHost>,
}

/// A disk of a built machine.
pub type Disk = Arc<Mutex<MmioTransport<Blk>>>;

/// All devices, and the buses that lead to them.
pub(crate) struct Machine {
    pub(crate) buses: Buses,
    pub(crate) consoles: MachineConsoles,
    pub(crate) doorbell: Arc<Mutex<Doorbell>>,
    pub(crate) disks: Vec<Disk>,
    pub(crate) vsock: Option<MachineVsock>,
    /// Those of [`slot`] in which there is a device.
    pub(crate) slots: Vec<u32>,
    pub(crate) devices: Devices,
}

/// The consoles of a machine, which are one to people: what both print goes to one place, and what is
/// typed goes to the better one.
pub(crate) struct MachineConsoles {
    serial: Arc<Mutex<Serial>>,
    virtio: Option<Arc<Mutex<MmioTransport<Console>>>>,
}

impl MachineConsoles {
    /// Passes on what was typed; returns how many bytes there is room for.
    pub(crate) fn enqueue(&self, typed: &[u8]) -> usize {
        match &self.virtio {
            Some(virtio) => lock(virtio).enqueue(typed),
            None => lock(&self.serial).enqueue(typed),
        }
    }
}

/// Where several consoles print.
#[derive(Clone)]
struct SharedConsole(Arc<Mutex<Box<dyn Write + Send>>>);

impl Write for SharedConsole {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        lock(&self.0).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        lock(&self.0).flush()
    }
}

/// Where a vCPU's accesses go.
#[derive(Clone)]
pub(crate) struct Buses {
    pub(crate) pio: Bus,
    pub(crate) mmio: Bus,
}

/// Every device of a machine, in the order in which it is saved.
#[derive(Clone)]
pub(crate) struct Devices {
    list: Vec<SharedDevice>,
    /// Stops their work when the machine is to stand still.
    pub(crate) brake: Brake,
}

impl Machine {
    /// Builds the devices in their places. `brake` stops them.
    pub(crate) fn build(
        vm: &Arc<VmFd>,
        config: &VmConfig,
        memory: &GuestMemory,
        peripherals: Peripherals,
        brake: Brake,
    ) -> Result<Machine, MachineError> {
        let line = |gsi| -> Arc<dyn InterruptLine> {
            Arc::new(Gsi {
                vm: vm.clone(),
                gsi,
            })
        };
        let doorbell_line = line(slot::DOORBELL_GSI);
        let doorbell = Doorbell::new(
            memory.clone(),
            doorbell_line,
            config.vcpus,
            config.doorbell_features,
        );
        let doorbell = Arc::new(Mutex::new(doorbell));
        let console = SharedConsole(Arc::new(Mutex::new(peripherals.console)));
        let serial = Serial::new(line(SERIAL_GSI), Box::new(console.clone()));
        let serial = Arc::new(Mutex::new(serial));
        let mut machine = Machine {
            buses: Buses {
                pio: Bus::new(brake.clone()),
                mmio: Bus::new(brake.clone()),
            },
            consoles: MachineConsoles {
                serial: serial.clone(),
                virtio: None,
            },
            doorbell: doorbell.clone(),
            disks: Vec::new(),
            vsock: None,
            slots: Vec::new(),
            devices: Devices {
                list: Vec::new(),
                brake: brake.clone(),
            },
        };
        machine.add_port(SERIAL_PORT, SERIAL_PORT_LEN, serial)?;
        machine.add_port(EXIT_PORT, EXIT_PORT_LEN, Arc::new(Mutex::new(ExitDevice)))?;
        machine.add_port(doorbell::PORT, doorbell::PORT_LEN, doorbell)?;
        let rng = MmioTransport::new(
            "rng".into(),
            Rng,
            memory.clone(),
            line(slot::gsi(slot::RNG)),
            brake.clone(),
        );
        machine.add_slot(slot::RNG, Arc::new(Mutex::new(rng)))?;
        for (at, (disk, layer)) in (slot::DISK0..).zip(config.disks.iter().zip(peripherals.disks)) {
            disk.check(layer.as_ref())?;
            let blk = Blk::new(layer, &disk.name);
            let name = format!("blk-{}", disk.name);
            let blk = MmioTransport::new(
                name,
                blk,
                memory.clone(),
                line(slot::gsi(at)),
                brake.clone(),
            );
            let blk = Arc::new(Mutex::new(blk));
            machine.disks.push(blk.clone());
            machine.add_slot(at, blk)?;
        }
        if machine.disks.len() != config.disks.len() {
            return Err(MachineError::Layers {
                named: config.disks.len(),
                given: machine.disks.len(),
            });
        }
        if config.vsock != peripherals.vsock.is_some() {
            return Err(MachineError::VsockHost {
                named: config.vsock,
            });
        }
        if let Some(host) = peripherals.vsock {
            let line = line(slot::gsi(slot::VSOCK));
            let vsock = MachineVsock::new(host, memory.clone(), line, brake.clone())
                .map_err(MachineError::Sockets)?;
            machine.add_slot(slot::VSOCK, vsock.device())?;
            machine.vsock = Some(vsock);
        }
        if config.virtio_console {
            let model = Console::new(Box::new(console));
            let line = line(slot::gsi(slot::CONSOLE));
            let virtio = MmioTransport::new("console".into(), model, memory.clone(), line, brake);
            let virtio = Arc::new(Mutex::new(virtio));
            machine.add_slot(slot::CONSOLE, virtio.clone())?;
            machine.consoles.virtio = Some(virtio);
        }
        Ok(machine)
    }

    fn add_port(&mut self, port: u16, len: u16, device: SharedDevice) -> Result<(), MachineError> {
        self.buses
            .pio
            .insert(u64::from(port), u64::from(len), device.clone())?;
        self.devices.list.push(device);
        Ok(())
    }

    fn add_slot(&mut self, index: u32, device: SharedDevice) -> Result<(), MachineError> {
        self.buses
            .mmio
            .insert(slot::base(index), slot::MMIO_STRIDE, device.clone())?;
        self.slots.push(index);
        self.devices.list.push(device);
        Ok(())
    }
}

impl Devices {
    /// Calls `each` for every device, in order, until one fails.
    pub(crate) fn each<E>(
        &self,
        mut each: impl FnMut(&mut dyn Device) -> Result<(), E>,
    ) -> Result<(), E> {
        self.list
            .iter()
            .try_for_each(|device| each(&mut *lock(device)))
    }

    /// Raises lost interrupts again and polls the queues, once after a restore.
    pub(crate) fn activate(&self) -> Result<(), DeviceError> {
        self.each(|device| device.activate())
    }
}

/// A device is as good as its last completed access, whatever became of the thread that made it.
pub(crate) fn lock<T: ?Sized>(device: &Mutex<T>) -> MutexGuard<'_, T> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

impl DiskConfig {
    fn check(&self, layer: &dyn BlockLayer) -> Result<(), MachineError> {
        if layer.len() != self.len {
            let (disk, needed, found) = (self.name.clone(), self.len, layer.len());
            return Err(MachineError::DiskLength {
                disk,
                needed,
                found,
            });
        }
        if layer.read_only() && !self.read_only {
            return Err(MachineError::DiskReadOnly {
                disk: self.name.clone(),
            });
        }
        Ok(())
    }
}

/// An interrupt line into the in-kernel irqchip. KVM_IRQ_LINE is synchronous: when it returns, the
/// interrupt is in the state that a save reads (an irqfd would reach the IOAPIC through a
/// workqueue, milliseconds later).
struct Gsi {
    vm: Arc<VmFd>,
    gsi: u32,
}

impl InterruptLine for Gsi {
    fn pulse(&self) -> io::Result<()> {
        self.vm.set_irq_line(self.gsi, true)?;
        self.vm.set_irq_line(self.gsi, false)?;
        Ok(())
    }
}

/// Why a machine cannot be built.
#[derive(Debug, Error)]
pub enum MachineError {
    /// A number of vCPUs out of range.
    #[error("{asked} vCPUs: a machine has 1 to {MAX_VCPUS}")]
    Vcpus {
        /// What was asked.
        asked: u32,
    },
    /// Too many disks.
    #[error("{asked} disks: a machine has at most {}", slot::DISKS)]
    Disks {
        /// What was asked.
        asked: usize,
    },
    /// A name that the guest cannot read whole.
    #[error("a disk is called {disk:?}: name it in 1 to {DISK_NAME_LEN} bytes")]
    DiskName {
        /// The name.
        disk: String,
    },
    /// A name that finds two disks, and two sections of a saved state.
    #[error("two disks are called {disk}: give each a name of its own")]
    DiskTwice {
        /// The name.
        disk: String,
    },
    /// The configuration names other disks than were given.
    #[error("the machine has {named} disks and {given} were given")]
    Layers {
        /// Disks of the configuration.
        named: usize,
        /// Layers given.
        given: usize,
    },
    /// A disk of another size.
    #[error("disk {disk} has {found} bytes and the machine needs one of {needed}")]
    DiskLength {
        /// Its name.
        disk: String,
        /// Bytes that the machine needs.
        needed: u64,
        /// Bytes that it has.
        found: u64,
    },
    /// A disk that the guest writes to is read-only.
    #[error("disk {disk} is read-only and the machine writes to it: open it without `ro`")]
    DiskReadOnly {
        /// Its name.
        disk: String,
    },
    /// The configuration has a socket device and nothing of the host was given for it, or the other way round.
    #[error("the machine has {} socket device, and the host's side of one was {}given",
            if *.named { "a" } else { "no" }, if *.named { "not " } else { "" })]
    VsockHost {
        /// Whether the configuration has one.
        named: bool,
    },
    /// The host has no descriptors or threads for the sockets of its guest.
    #[error("the host refused what a socket device needs: raise `ulimit -n` or `ulimit -u`")]
    Sockets(#[source] io::Error),
    /// Two devices at one place: a bug in the layout.
    #[error(transparent)]
    Bus(#[from] BusError),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(names: &[&str]) -> Result<(), MachineError> {
        let disk = |name: &&str| DiskConfig {
            name: (*name).into(),
            len: 512,
            read_only: false,
        };
        VmConfig {
            disks: names.iter().map(disk).collect(),
            ..VmConfig::new(16, 1)
        }
        .check()
    }

    #[test]
    fn disks_are_told_apart_by_names_that_the_guest_can_read_whole() {
        check(&["a", "b", "12345678901234567890"]).unwrap();
        for name in ["", "123456789012345678901"] {
            let refused = check(&["a", name]);
            assert!(matches!(refused, Err(MachineError::DiskName { disk }) if disk == name));
        }
        let refused = check(&["a", "b", "a"]);
        assert!(matches!(refused, Err(MachineError::DiskTwice { disk }) if disk == "a"));
    }
}
