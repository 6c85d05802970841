//! The guest's half of one virtqueue of several: where its rings lie, and what it has put there.

use forkvm_devices::{Device, Effect, GuestMemory};
use vm_memory::{Bytes, GuestAddress};

use crate::driver::{Descriptor, NEXT, QUEUE_SIZE, read32, reg, status, write32};

const AVAIL: u64 = 0x400;
const USED: u64 = 0x800;

/// A virtqueue of [`QUEUE_SIZE`] entries.
pub(crate) struct Ring {
    queue: u32,
    base: u64,
    submitted: u16,
    taken: u16,
}

/// Brings a device whose driver accepts `features` to work, with queue `i` at page `i + 1` of memory.
pub(crate) fn start(
    device: &mut dyn Device,
    memory: &GuestMemory,
    features: u64,
    queues: u32,
) -> Vec<Ring> {
    set(device, reg::STATUS, 0);
    set(device, reg::STATUS, status::ACKNOWLEDGE);
    set(device, reg::STATUS, status::ACKNOWLEDGE | status::DRIVER);
    for half in 0..2 {
        set(device, reg::DRIVER_FEATURES_SEL, half);
        set(
            device,
            reg::DRIVER_FEATURES,
            (features >> (32 * half)) as u32,
        );
    }
    let ready = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
    set(device, reg::STATUS, ready);
    assert_eq!(read32(device, reg::STATUS), ready, "features are accepted");
    let rings = (0..queues)
        .map(|queue| Ring::set_up(queue, device, memory))
        .collect();
    set(device, reg::STATUS, ready | status::DRIVER_OK);
    rings
}

fn set(device: &mut dyn Device, offset: u64, value: u32) {
    assert_eq!(write32(device, offset, value), Effect::None);
}

impl Ring {
    fn set_up(queue: u32, device: &mut dyn Device, memory: &GuestMemory) -> Ring {
        let base = 0x1000 * (u64::from(queue) + 1);
        memory
            .write_slice(&[0; 0x1000], GuestAddress(base))
            .unwrap();
        set(device, reg::QUEUE_SEL, queue);
        set(device, reg::QUEUE_NUM, u32::from(QUEUE_SIZE));
        for (register, address) in [
            (reg::QUEUE_DESC, base),
            (reg::QUEUE_AVAIL, base + AVAIL),
            (reg::QUEUE_USED, base + USED),
        ] {
            set(device, register, address as u32);
            set(device, register + 4, 0);
        }
        set(device, reg::QUEUE_READY, 1);
        assert_eq!(read32(device, reg::QUEUE_READY), 1);
        Ring {
            queue,
            base,
            submitted: 0,
            taken: 0,
        }
    }

    /// The same ring in another VM whose memory is a copy.
    pub(crate) fn copy(&self) -> Ring {
        Ring { ..*self }
    }

    /// Puts a chain at descriptor `head` and those after it, and makes it available.
    pub(crate) fn offer(&mut self, memory: &GuestMemory, head: u16, chain: &[Descriptor]) {
        for (index, descriptor) in (head..).zip(chain) {
            assert!(index < QUEUE_SIZE);
            let is_last = usize::from(index - head) + 1 == chain.len();
            let flags = descriptor.flags | if is_last { 0 } else { NEXT };
            let mut raw = [0; 16];
            raw[..8].copy_from_slice(&descriptor.address.to_le_bytes());
            raw[8..12].copy_from_slice(&descriptor.len.to_le_bytes());
            raw[12..14].copy_from_slice(&flags.to_le_bytes());
            raw[14..].copy_from_slice(&(index + 1).to_le_bytes());
            let at = GuestAddress(self.base + 16 * u64::from(index));
            memory.write_slice(&raw, at).unwrap();
        }
        let avail = self.base + AVAIL;
        let slot = avail + 4 + 2 * u64::from(self.submitted % QUEUE_SIZE);
        memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.submitted = self.submitted.wrapping_add(1);
        let order = std::sync::atomic::Ordering::Release;
        memory
            .store(self.submitted, GuestAddress(avail + 2), order)
            .unwrap();
    }

    pub(crate) fn notify(&self, device: &mut dyn Device) {
        set(device, reg::QUEUE_NOTIFY, self.queue);
    }

    /// Whether a chain came back that was not taken yet.
    pub(crate) fn has_returned(&self, memory: &GuestMemory) -> bool {
        let order = std::sync::atomic::Ordering::Acquire;
        let done = GuestAddress(self.base + USED + 2);
        memory.load::<u16>(done, order).unwrap() != self.taken
    }

    /// The next chain that came back: its head, and how many bytes were written. The next one after it
    /// is to interrupt.
    pub(crate) fn take(&mut self, memory: &GuestMemory) -> Option<(u16, u32)> {
        if !self.has_returned(memory) {
            return None;
        }
        let at = self.base + USED + 4 + 8 * u64::from(self.taken % QUEUE_SIZE);
        self.taken = self.taken.wrapping_add(1);
        let used_event = self.base + AVAIL + 4 + 2 * u64::from(QUEUE_SIZE);
        memory
            .write_obj(self.taken, GuestAddress(used_event))
            .unwrap();
        let head: u32 = memory.read_obj(GuestAddress(at)).unwrap();
        let len = memory.read_obj(GuestAddress(at + 4)).unwrap();
        Some((head as u16, len))
    }
}
