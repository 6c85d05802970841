//! The heap: all RAM from the end of the image on, in every region of the memory map.
//!
//! Nothing of it is touched before it is allocated: populated memory is what the host pays for.

#![allow(unsafe_code)] // Hands raw memory to the allocator.

use core::ptr::with_exposed_provenance_mut;

use forkvm_abi::HIGH_RAM_START;
use talc::TalcLock;
use talc::source::Manual;

use crate::boot_info::BootInfo;
use crate::paging;

#[global_allocator]
static HEAP: TalcLock<spin::Mutex<()>, Manual> = TalcLock::new(Manual);

unsafe extern "C" {
    /// End of the image; the linker script's.
    static image_end: u8;
}

/// Gives the RAM of `boot` to the allocator. Called once.
pub fn claim(boot: &BootInfo) {
    let image = (&raw const image_end).addr() as u64;
    for &(start, end) in boot
        .ram()
        .iter()
        .filter(|(start, _)| *start < HIGH_RAM_START)
    {
        claim_range(start.max(image), end.min(HIGH_RAM_START));
    }
    // The tables of high RAM come from the heap, so low RAM has to be there first.
    for &(start, end) in boot
        .ram()
        .iter()
        .filter(|(start, _)| *start >= HIGH_RAM_START)
    {
        paging::map_high(end);
        claim_range(start, end);
    }
}

fn claim_range(start: u64, end: u64) {
    if start < end {
        let base = with_exposed_provenance_mut(start as usize);
        // SAFETY: RAM by the memory map, mapped, behind the image, and claimed once. A range too
        // small for the allocator is refused by it and stays unused.
        unsafe { HEAP.lock().claim(base, (end - start) as usize) };
    }
}
