//! The doorbell page: memory of this process that the host writes.
//!
//! It is shared anonymous memory, so that a write after a `fork` of this process does not move it to another
//! frame, it is kept out of children, and locked. A kernel with compaction may move it all the same: who rings
//! asks for the frame each time.

#![allow(unsafe_code)] // A page that the host writes.

use std::fs::File;
use std::io;
use std::mem::offset_of;
use std::os::unix::fs::FileExt;
use std::ptr;

use forkvm_abi::doorbell::{Call, Page, PageHeader, call_offset};
use forkvm_agent_protocol::Generation;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mlock, mmap_anonymous};

const SIZE: usize = size_of::<Page>();

/// Bit of an entry of `/proc/self/pagemap`: the page is in RAM. The frame is in bits 0..=54.
const PRESENT: u64 = 1 << 63;
const FRAME: u64 = (1 << 55) - 1;

/// The page. It stays mapped as long as the process lives.
#[derive(Clone, Copy)]
pub(super) struct DoorbellPage {
    address: *mut u8,
}

// SAFETY: the mapping is never taken away. All accesses are volatile and of integers; the one thread that owns the
// doorbell writes, others read the header, which only the host writes, while every vCPU stands.
unsafe impl Send for DoorbellPage {}
// SAFETY: as above.
unsafe impl Sync for DoorbellPage {}

impl DoorbellPage {
    /// A page of zeroes, in RAM.
    ///
    /// # Errors
    /// The kernel has no page to lock.
    pub(super) fn map() -> io::Result<DoorbellPage> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping where the kernel likes; nothing lies there.
        let address =
            unsafe { mmap_anonymous(ptr::null_mut(), SIZE, protection, MapFlags::SHARED)? };
        // SAFETY: exactly the mapping made above. A child never uses it.
        unsafe { madvise(address, SIZE, Advice::LinuxDontFork)? };
        // SAFETY: exactly the mapping made above. It is brought into RAM by this.
        unsafe { mlock(address, SIZE)? };
        Ok(DoorbellPage {
            address: address.cast(),
        })
    }

    /// Number of the page's frame.
    ///
    /// # Errors
    /// `/proc/self/pagemap` cannot be read, or shows no frames: it wants CAP_SYS_ADMIN and CONFIG_PROC_PAGE_MONITOR.
    pub(super) fn frame(self) -> io::Result<u32> {
        let mut entry = [0; 8];
        let at = (self.address.addr() / SIZE * entry.len()) as u64;
        File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, at)?;
        let entry = u64::from_le_bytes(entry);
        match u32::try_from(entry & FRAME) {
            Ok(frame) if entry & PRESENT != 0 && frame != 0 => Ok(frame),
            _ => Err(io::Error::other(format!(
                "/proc/self/pagemap shows no frame of the doorbell page ({entry:#x}): it wants CAP_SYS_ADMIN"
            ))),
        }
    }

    /// Puts a call into a slot, for the host to read when the bell rings.
    pub(super) fn write_call(self, slot: usize, call: Call) {
        let place = self.address.wrapping_add(call_offset(slot)).cast::<Call>();
        // SAFETY: `call_offset` is within the page, which is mapped, and aligned.
        unsafe { place.write_volatile(call) };
    }

    /// What the host made of it.
    pub(super) fn read_call(self, slot: usize) -> Call {
        let place = self.address.wrapping_add(call_offset(slot)).cast::<Call>();
        // SAFETY: as in `write_call`; integers only, so whatever the host wrote is valid.
        unsafe { place.read_volatile() }
    }

    /// The clone id that the host tells.
    pub(super) fn clone_id(self) -> u32 {
        self.header::<u32>(offset_of!(PageHeader, clone_id))
    }

    /// The generation that the host tells.
    pub(super) fn generation(self) -> Generation {
        Generation(self.header(offset_of!(PageHeader, generation)))
    }

    /// A field of integers at `offset` of the header.
    fn header<T: Copy>(self, offset: usize) -> T {
        let place = self.address.wrapping_add(offset).cast::<T>();
        // SAFETY: the callers name fields of the header with their types: aligned, mapped, integers only.
        unsafe { place.read_volatile() }
    }
}
