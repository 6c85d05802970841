//! The guest's half of the tests: memory, an interrupt line that counts, and a virtio driver that
//! does what a guest does, through registers and rings.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use forkvm_devices::virtio::{MmioTransport, VirtioDevice};
use forkvm_devices::{Brake, Device, Effect, GuestMemory, InterruptLine};
use vm_memory::{Bytes, GuestAddress};

pub(crate) const RAM: u64 = 1 << 20;
pub(crate) const DESC: u64 = 0x1000;
pub(crate) const AVAIL: u64 = 0x2000;
pub(crate) const USED: u64 = 0x3000;
/// First address that the rings leave free.
pub(crate) const DATA: u64 = 0x1_0000;
pub(crate) const QUEUE_SIZE: u16 = 16;

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

pub(crate) const VERSION_1: u64 = 1 << 32;
pub(crate) const EVENT_IDX: u64 = 1 << 29;

/// Offsets of registers (virtio 1.2 section 4.2.2).
pub(crate) mod reg {
    pub(crate) const MAGIC: u64 = 0x00;
    pub(crate) const VERSION: u64 = 0x04;
    pub(crate) const DEVICE_ID: u64 = 0x08;
    pub(crate) const DEVICE_FEATURES: u64 = 0x10;
    pub(crate) const DEVICE_FEATURES_SEL: u64 = 0x14;
    pub(crate) const DRIVER_FEATURES: u64 = 0x20;
    pub(crate) const DRIVER_FEATURES_SEL: u64 = 0x24;
    pub(crate) const QUEUE_SEL: u64 = 0x30;
    pub(crate) const QUEUE_NUM_MAX: u64 = 0x34;
    pub(crate) const QUEUE_NUM: u64 = 0x38;
    pub(crate) const QUEUE_READY: u64 = 0x44;
    pub(crate) const QUEUE_NOTIFY: u64 = 0x50;
    pub(crate) const INTERRUPT_STATUS: u64 = 0x60;
    pub(crate) const INTERRUPT_ACK: u64 = 0x64;
    pub(crate) const STATUS: u64 = 0x70;
    pub(crate) const QUEUE_DESC: u64 = 0x80;
    pub(crate) const QUEUE_AVAIL: u64 = 0x90;
    pub(crate) const QUEUE_USED: u64 = 0xa0;
}

/// Bits of the status register.
pub(crate) mod status {
    pub(crate) const ACKNOWLEDGE: u32 = 1;
    pub(crate) const DRIVER: u32 = 2;
    pub(crate) const DRIVER_OK: u32 = 4;
    pub(crate) const FEATURES_OK: u32 = 8;
    pub(crate) const NEEDS_RESET: u32 = 0x40;
}

/// An interrupt line that counts its edges.
#[derive(Default)]
pub(crate) struct Line(AtomicUsize);

impl Line {
    pub(crate) fn edges(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

impl InterruptLine for Line {
    fn pulse(&self) -> io::Result<()> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

pub(crate) fn ram() -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap()
}

/// A second VM's memory with the content of `memory`.
pub(crate) fn copy_of(memory: &GuestMemory) -> GuestMemory {
    let copy = ram();
    copy.write_slice(&all(memory), GuestAddress(0)).unwrap();
    copy
}

pub(crate) fn all(memory: &GuestMemory) -> Vec<u8> {
    let mut bytes = vec![0; RAM as usize];
    memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    bytes
}

pub(crate) fn read32(device: &mut dyn Device, offset: u64) -> u32 {
    let mut data = [0xaa; 4];
    device.read(offset, &mut data);
    u32::from_le_bytes(data)
}

pub(crate) fn write32(device: &mut dyn Device, offset: u64, value: u32) -> Effect {
    device.write(offset, &value.to_le_bytes())
}

/// A descriptor as a guest writes it; `next` is the driver's business.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Descriptor {
    pub(crate) address: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

pub(crate) fn readable(address: u64, len: u32) -> Descriptor {
    Descriptor {
        address,
        len,
        flags: 0,
        next: 0,
    }
}

pub(crate) fn writable(address: u64, len: u32) -> Descriptor {
    Descriptor {
        address,
        len,
        flags: WRITE,
        next: 0,
    }
}

/// A virtio-mmio device and the driver of its first queue.
pub(crate) struct Driver<D: VirtioDevice> {
    pub(crate) device: MmioTransport<D>,
    pub(crate) memory: GuestMemory,
    pub(crate) line: Arc<Line>,
    pub(crate) brake: Brake,
    submitted: u16,
}

impl<D: VirtioDevice> Driver<D> {
    /// A device after reset.
    pub(crate) fn new(model: D) -> Driver<D> {
        Driver::with_memory(model, ram())
    }

    pub(crate) fn with_memory(model: D, memory: GuestMemory) -> Driver<D> {
        let line = Arc::new(Line::default());
        let brake = Brake::default();
        let device = MmioTransport::new(
            "dut".into(),
            model,
            memory.clone(),
            line.clone(),
            brake.clone(),
        );
        Driver {
            device,
            memory,
            line,
            brake,
            submitted: 0,
        }
    }

    /// A device whose driver accepted `features` and runs.
    pub(crate) fn running(model: D, features: u64) -> Driver<D> {
        let mut driver = Driver::new(model);
        driver.start(features);
        driver
    }

    pub(crate) fn start(&mut self, features: u64) {
        self.negotiate(features);
        assert_ne!(
            self.get(reg::STATUS) & status::FEATURES_OK,
            0,
            "features are accepted"
        );
        self.set_up_queue();
        self.add_status(status::DRIVER_OK);
    }

    pub(crate) fn negotiate(&mut self, features: u64) {
        self.set(reg::STATUS, 0);
        self.add_status(status::ACKNOWLEDGE);
        self.add_status(status::DRIVER);
        for half in 0..2 {
            self.set(reg::DRIVER_FEATURES_SEL, half);
            self.set(reg::DRIVER_FEATURES, (features >> (32 * half)) as u32);
        }
        self.add_status(status::FEATURES_OK);
    }

    pub(crate) fn set_up_queue(&mut self) {
        self.memory
            .write_slice(&vec![0; (DATA - DESC) as usize], GuestAddress(DESC))
            .unwrap();
        self.submitted = 0;
        self.set(reg::QUEUE_SEL, 0);
        self.set(reg::QUEUE_NUM, u32::from(QUEUE_SIZE));
        for (register, address) in [
            (reg::QUEUE_DESC, DESC),
            (reg::QUEUE_AVAIL, AVAIL),
            (reg::QUEUE_USED, USED),
        ] {
            self.set(register, address as u32);
            self.set(register + 4, (address >> 32) as u32);
        }
        self.set(reg::QUEUE_READY, 1);
    }

    pub(crate) fn get(&mut self, offset: u64) -> u32 {
        read32(&mut self.device, offset)
    }

    pub(crate) fn set(&mut self, offset: u64, value: u32) {
        assert_eq!(write32(&mut self.device, offset, value), Effect::None);
    }

    pub(crate) fn add_status(&mut self, bit: u32) {
        let status = self.get(reg::STATUS);
        self.set(reg::STATUS, status | bit);
    }

    pub(crate) fn offered(&mut self) -> u64 {
        self.set(reg::DEVICE_FEATURES_SEL, 0);
        let low = self.get(reg::DEVICE_FEATURES);
        self.set(reg::DEVICE_FEATURES_SEL, 1);
        u64::from(self.get(reg::DEVICE_FEATURES)) << 32 | u64::from(low)
    }

    /// Writes descriptors as they are, from index 0 of the table at `table`.
    pub(crate) fn write_table(&self, table: u64, descriptors: &[Descriptor]) {
        for (index, descriptor) in descriptors.iter().enumerate() {
            let at = table + 16 * index as u64;
            let put = |offset, value: &[u8]| {
                self.memory
                    .write_slice(value, GuestAddress(at + offset))
                    .unwrap();
            };
            put(0, &descriptor.address.to_le_bytes());
            put(8, &descriptor.len.to_le_bytes());
            put(12, &descriptor.flags.to_le_bytes());
            put(14, &descriptor.next.to_le_bytes());
        }
    }

    /// Makes the chain that starts at descriptor `head` available, without a notification.
    pub(crate) fn offer(&mut self, head: u16) {
        let slot = AVAIL + 4 + 2 * u64::from(self.submitted % QUEUE_SIZE);
        self.submitted = self.submitted.wrapping_add(1);
        self.put16(slot, head);
        self.put16(AVAIL + 2, self.submitted);
    }

    pub(crate) fn notify(&mut self) {
        self.set(reg::QUEUE_NOTIFY, 0);
    }

    /// Puts `descriptors`, linked in order, into the table and makes them available.
    pub(crate) fn offer_chain(&mut self, descriptors: &[Descriptor]) {
        let last = descriptors.len() - 1;
        let linked: Vec<_> = descriptors
            .iter()
            .enumerate()
            .map(|(index, descriptor)| Descriptor {
                flags: descriptor.flags | if index < last { NEXT } else { 0 },
                next: index as u16 + 1,
                ..*descriptor
            })
            .collect();
        self.write_table(DESC, &linked);
        self.offer(0);
    }

    /// Has a request served, and returns how many bytes the device says it wrote.
    pub(crate) fn request(&mut self, descriptors: &[Descriptor]) -> u32 {
        let before = self.used();
        self.offer_chain(descriptors);
        self.notify();
        assert_eq!(self.used(), before.wrapping_add(1), "the request came back");
        self.used_len(before)
    }

    /// Number of requests that came back.
    pub(crate) fn used(&self) -> u16 {
        self.get16(USED + 2)
    }

    fn used_len(&self, index: u16) -> u32 {
        let at = USED + 4 + 8 * u64::from(index % QUEUE_SIZE) + 4;
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }

    pub(crate) fn put16(&self, at: u64, value: u16) {
        self.memory.write_obj(value, GuestAddress(at)).unwrap();
    }

    fn get16(&self, at: u64) -> u16 {
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }

    pub(crate) fn put(&self, at: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
    }

    pub(crate) fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read_slice(&mut bytes, GuestAddress(at))
            .unwrap();
        bytes
    }
}
