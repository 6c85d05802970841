//! A driver for one virtio block device behind virtio-mmio (virtio 1.2, sections 4.2 and 5.2).
//!
//! One request at a time and disk; vCPUs that share a disk take turns. A request is normally
//! waited for by polling, since forkvm answers within the notification; a job can wait by the
//! interrupt instead ([`Wait`]). Everything is mapped where it is, so a pointer is what the device
//! needs.

#![allow(unsafe_code)] // Device registers, and memory that a device reads and writes.

use alloc::boxed::Box;
use core::fmt;
use core::ptr::with_exposed_provenance_mut;
use core::sync::atomic::{AtomicU16, Ordering, fence};

use forkvm_abi::slot;
use spin::{Mutex, MutexGuard};

use crate::interrupts;

/// Bytes of a sector.
pub const SECTOR: usize = 512;
/// Most bytes of one request; longer transfers are cut.
const REQUEST: usize = 1 << 20;
/// Most bytes of one segment of a request.
const SEGMENT: usize = 128 << 10;
/// Length of the queue; a power of two, and room for header, segments and status.
const QUEUE: usize = 16;
const _: () = assert!(QUEUE >= REQUEST / SEGMENT + 1 + 2 && QUEUE.is_power_of_two());

/// Registers (section 4.2.2).
mod reg {
    pub(super) const MAGIC: usize = 0x000;
    pub(super) const VERSION: usize = 0x004;
    pub(super) const DEVICE_ID: usize = 0x008;
    pub(super) const DEVICE_FEATURES: usize = 0x010;
    pub(super) const DEVICE_FEATURES_SEL: usize = 0x014;
    pub(super) const DRIVER_FEATURES: usize = 0x020;
    pub(super) const DRIVER_FEATURES_SEL: usize = 0x024;
    pub(super) const QUEUE_SEL: usize = 0x030;
    pub(super) const QUEUE_NUM_MAX: usize = 0x034;
    pub(super) const QUEUE_NUM: usize = 0x038;
    pub(super) const QUEUE_READY: usize = 0x044;
    pub(super) const QUEUE_NOTIFY: usize = 0x050;
    pub(super) const INTERRUPT_STATUS: usize = 0x060;
    pub(super) const INTERRUPT_ACK: usize = 0x064;
    pub(super) const STATUS: usize = 0x070;
    pub(super) const QUEUE_DESC: usize = 0x080;
    pub(super) const QUEUE_DRIVER: usize = 0x090;
    pub(super) const QUEUE_DEVICE: usize = 0x0a0;
    pub(super) const CONFIG: usize = 0x100;
}

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const BLOCK_DEVICE: u32 = 2;

/// Device status (section 2.1).
const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;

/// Features (sections 5.2.3 and 6).
const F_READ_ONLY: u64 = 1 << 5;
const F_FLUSH: u64 = 1 << 9;
const F_VERSION_1: u64 = 1 << 32;

/// Descriptor flags (section 2.7.5).
const NEXT: u16 = 1;
const DEVICE_WRITES: u16 = 2;
/// Flag of the driver's ring: no interrupt, please.
const NO_INTERRUPT: u16 = 1;

/// Request types (section 5.2.6).
const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
/// Status that no device writes: the request was not answered.
const UNANSWERED: u8 = 0xff;

/// How the end of a request is waited for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// By looking at the queue.
    Poll,
    /// By halting until the disk's interrupt; on the first vCPU only.
    Interrupt,
}

/// Why a disk could not be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskError {
    /// The request reaches beyond the end, or its length is no multiple of a sector.
    Range,
    /// The device answered with this status: 1 is an I/O error, 2 an unknown request.
    Status(u8),
}

impl fmt::Display for DiskError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DiskError::Range => write!(out, "a request beyond its end, or not of whole sectors"),
            DiskError::Status(status) => write!(out, "it answered with status {status}"),
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

#[repr(C)]
struct Header {
    kind: u32,
    reserved: u32,
    sector: u64,
}

#[repr(C)]
struct UsedElement {
    id: u32,
    len: u32,
}

/// What driver and device share: the queue (section 2.7), and header and status of the request.
#[repr(C, align(4096))]
struct Shared {
    descriptors: [Descriptor; QUEUE],
    driver_flags: AtomicU16,
    driver_index: AtomicU16,
    driver_ring: [AtomicU16; QUEUE],
    driver_event: u16,
    padding: u16,
    device_flags: AtomicU16,
    device_index: AtomicU16,
    device_ring: [UsedElement; QUEUE],
    device_event: u16,
    header: Header,
    status: u8,
}

/// A disk that is ready for requests.
pub struct Disk {
    registers: usize,
    gsi: u32,
    bytes: u64,
    read_only: bool,
    queue: Mutex<&'static mut Shared>,
}

/// A request that the device may take, but has not been told of.
#[must_use]
pub struct Posted<'a> {
    disk: &'a Disk,
    queue: MutexGuard<'a, &'static mut Shared>,
    wait: Wait,
    /// Index that the device's ring has when the request is answered.
    answered: u16,
    /// The data belongs to the device until then.
    _data: core::marker::PhantomData<&'a mut [u8]>,
}

impl Disk {
    /// Brings up disk `index` of the machine; `None` when its slot holds no disk.
    pub fn open(index: u32) -> Option<Disk> {
        let slot = slot::DISK0 + index;
        let registers = slot::base(slot) as usize;
        if read(registers, reg::MAGIC) != MAGIC
            || read(registers, reg::VERSION) != VERSION
            || read(registers, reg::DEVICE_ID) != BLOCK_DEVICE
        {
            return None;
        }
        // SAFETY: all of it are integers, for which zero is a value.
        let shared: Shared = unsafe { core::mem::zeroed() };
        let shared: &'static mut Shared = Box::leak(Box::new(shared));

        // The order of section 3.1.1.
        write(registers, reg::STATUS, 0);
        write(registers, reg::STATUS, ACKNOWLEDGE | DRIVER);
        let offered = features(registers);
        let wanted = offered & (F_READ_ONLY | F_FLUSH | F_VERSION_1);
        for half in 0..2 {
            write(registers, reg::DRIVER_FEATURES_SEL, half);
            write(
                registers,
                reg::DRIVER_FEATURES,
                (wanted >> (32 * half)) as u32,
            );
        }
        write(registers, reg::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        write(registers, reg::QUEUE_SEL, 0);
        if read(registers, reg::STATUS) & FEATURES_OK == 0
            || (read(registers, reg::QUEUE_NUM_MAX) as usize) < QUEUE
        {
            return None;
        }
        write(registers, reg::QUEUE_NUM, QUEUE as u32);
        write64(
            registers,
            reg::QUEUE_DESC,
            (&raw const shared.descriptors).addr(),
        );
        write64(
            registers,
            reg::QUEUE_DRIVER,
            (&raw const shared.driver_flags).addr(),
        );
        write64(
            registers,
            reg::QUEUE_DEVICE,
            (&raw const shared.device_flags).addr(),
        );
        write(registers, reg::QUEUE_READY, 1);
        write(
            registers,
            reg::STATUS,
            ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK,
        );

        let [low, high] = [0, 4].map(|at| u64::from(read(registers, reg::CONFIG + at)));
        Some(Disk {
            registers,
            gsi: slot::gsi(slot),
            bytes: (high << 32 | low) * SECTOR as u64,
            read_only: offered & F_READ_ONLY != 0,
            queue: Mutex::new(shared),
        })
    }

    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether writes are refused.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Lets the disk's interrupt in, which [`Wait::Interrupt`] needs.
    pub fn enable_interrupt(&self) {
        interrupts::route(self.gsi);
    }

    /// Reads whole sectors from `sector` on.
    pub fn read(&self, sector: u64, data: &mut [u8]) -> Result<(), DiskError> {
        self.check(sector, data.len())?;
        let mut at = sector;
        for part in data.chunks_mut(REQUEST) {
            let sectors = (part.len() / SECTOR) as u64;
            self.post(READ, at, part.as_mut_ptr(), part.len(), Wait::Poll)
                .finish()?;
            at += sectors;
        }
        Ok(())
    }

    /// Writes whole sectors from `sector` on.
    pub fn write(&self, sector: u64, data: &[u8]) -> Result<(), DiskError> {
        let mut at = sector;
        for part in data.chunks(REQUEST) {
            self.post_write(at, part, Wait::Poll)?.finish()?;
            at += (part.len() / SECTOR) as u64;
        }
        Ok(())
    }

    /// Queues a write of at most 1 MiB without telling the device; [`Posted::finish`] does that.
    pub fn post_write<'a>(
        &'a self,
        sector: u64,
        data: &'a [u8],
        wait: Wait,
    ) -> Result<Posted<'a>, DiskError> {
        self.check(sector, data.len())?;
        if data.len() > REQUEST {
            return Err(DiskError::Range);
        }
        Ok(self.post(WRITE, sector, data.as_ptr().cast_mut(), data.len(), wait))
    }

    /// Makes what was written stable.
    pub fn flush(&self) -> Result<(), DiskError> {
        self.post(FLUSH, 0, core::ptr::null_mut(), 0, Wait::Poll)
            .finish()
    }

    /// The disk's id, padded with zeros.
    pub fn id(&self) -> Result<[u8; 20], DiskError> {
        let mut id = [0; 20];
        self.post(GET_ID, 0, id.as_mut_ptr(), id.len(), Wait::Poll)
            .finish()?;
        Ok(id)
    }

    fn check(&self, sector: u64, len: usize) -> Result<(), DiskError> {
        let end = sector
            .checked_mul(SECTOR as u64)
            .and_then(|at| at.checked_add(len as u64));
        match end {
            Some(end) if end <= self.bytes && len.is_multiple_of(SECTOR) => Ok(()),
            _ => Err(DiskError::Range),
        }
    }

    /// Queues a request. What `data` points to belongs to the device until it is finished.
    fn post(&self, kind: u32, sector: u64, data: *mut u8, len: usize, wait: Wait) -> Posted<'_> {
        let mut queue = self.queue.lock();
        queue.header = Header {
            kind,
            reserved: 0,
            sector,
        };
        queue.status = UNANSWERED;
        let data_flags = if kind == WRITE {
            NEXT
        } else {
            NEXT | DEVICE_WRITES
        };
        let header = (&raw const queue.header).expose_provenance();
        let status = (&raw mut queue.status).expose_provenance();
        let mut put = {
            let descriptors = &mut queue.descriptors;
            let mut index = 0;
            move |address: usize, len: usize, flags: u16| {
                descriptors[index] = Descriptor {
                    address: address as u64,
                    len: len as u32,
                    flags,
                    next: index as u16 + 1,
                };
                index += 1;
            }
        };
        put(header, size_of::<Header>(), NEXT);
        let start = data.expose_provenance();
        for at in (0..len).step_by(SEGMENT) {
            put(start + at, SEGMENT.min(len - at), data_flags);
        }
        put(status, 1, DEVICE_WRITES);

        let flags = if wait == Wait::Poll { NO_INTERRUPT } else { 0 };
        queue.driver_flags.store(flags, Ordering::Relaxed);
        let index = queue.driver_index.load(Ordering::Relaxed);
        queue.driver_ring[usize::from(index) % QUEUE].store(0, Ordering::Relaxed);
        // The device sees the index only after everything that it leads to.
        queue
            .driver_index
            .store(index.wrapping_add(1), Ordering::Release);
        let answered = index.wrapping_add(1);
        Posted {
            disk: self,
            queue,
            wait,
            answered,
            _data: core::marker::PhantomData,
        }
    }
}

impl Posted<'_> {
    /// Tells the device and waits for its answer.
    pub fn finish(self) -> Result<(), DiskError> {
        let (disk, shared) = (self.disk, &**self.queue);
        fence(Ordering::SeqCst);
        write(disk.registers, reg::QUEUE_NOTIFY, 0);
        loop {
            let seen = interrupts::count(disk.gsi);
            if shared.device_index.load(Ordering::Acquire) == self.answered {
                break;
            }
            match self.wait {
                Wait::Poll => core::hint::spin_loop(),
                Wait::Interrupt => interrupts::wait_for(disk.gsi, seen),
            }
        }
        if self.wait == Wait::Interrupt {
            let pending = read(disk.registers, reg::INTERRUPT_STATUS);
            write(disk.registers, reg::INTERRUPT_ACK, pending);
        }
        // SAFETY: a byte of this queue, which the device has written.
        match unsafe { (&raw const shared.status).read_volatile() } {
            0 => Ok(()),
            status => Err(DiskError::Status(status)),
        }
    }
}

fn features(registers: usize) -> u64 {
    let half = |index: u32| {
        write(registers, reg::DEVICE_FEATURES_SEL, index);
        u64::from(read(registers, reg::DEVICE_FEATURES))
    };
    half(0) | half(1) << 32
}

fn read(registers: usize, register: usize) -> u32 {
    // SAFETY: a 32-bit register in the window of a slot, which is mapped; an empty slot reads as 0.
    unsafe { with_exposed_provenance_mut::<u32>(registers + register).read_volatile() }
}

fn write(registers: usize, register: usize, value: u32) {
    // SAFETY: as for `read`; the device touches only memory that this driver gave it.
    unsafe { with_exposed_provenance_mut::<u32>(registers + register).write_volatile(value) };
}

fn write64(registers: usize, register: usize, value: usize) {
    write(registers, register, value as u32);
    write(registers, register + 4, (value as u64 >> 32) as u32);
}
