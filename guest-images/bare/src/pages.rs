//! Large arrays of memory pages whose content can be told from their number and a seed.
//!
//! Jobs use them as the memory that a fork must carry over. A page is populated when it is filled,
//! never by making the array.

#![allow(unsafe_code)] // Memory that no constructor has written.

use alloc::alloc::{Layout, alloc, handle_alloc_error};
use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::random;

/// Bytes of a page.
pub const PAGE: usize = 4096;
/// Pages of a MiB.
pub const PER_MIB: usize = (1 << 20) / PAGE;
/// 64-bit words of a page.
pub const WORDS: usize = PAGE / 8;

/// A page of memory that any vCPU may read and write, word by word.
#[repr(C, align(4096))]
pub struct Page([AtomicU64; WORDS]);

impl Page {
    /// Reads word `index`, below [`WORDS`].
    pub fn get(&self, index: usize) -> u64 {
        self.0[index].load(Ordering::Relaxed)
    }

    /// Writes word `index`, below [`WORDS`].
    pub fn set(&self, index: usize, value: u64) {
        self.0[index].store(value, Ordering::Relaxed);
    }

    /// Fills the page with what [`Page::check`] expects of the same `seed` and `number`.
    pub fn fill(&self, seed: u64, number: u64) {
        (0..WORDS).for_each(|index| self.set(index, word(seed, number, index)));
    }

    /// Sum of the words, or the index of the first one that [`Page::fill`] did not write.
    pub fn check(&self, seed: u64, number: u64) -> Result<u64, usize> {
        let mut sum = 0u64;
        for index in 0..WORDS {
            let value = self.get(index);
            if value != word(seed, number, index) {
                return Err(index);
            }
            sum = sum.wrapping_add(value);
        }
        Ok(sum)
    }
}

fn word(seed: u64, number: u64, index: usize) -> u64 {
    random::mix(seed ^ (number * WORDS as u64 + index as u64))
}

/// `count` pages of the heap, for good. Their content is arbitrary.
pub fn allocate(count: usize) -> &'static [Page] {
    let layout = match Layout::array::<Page>(count) {
        Ok(layout) if count > 0 => layout,
        _ => return &[],
    };
    // SAFETY: the layout is not empty.
    let mut memory = unsafe { alloc(layout) };
    if memory.is_null() {
        handle_alloc_error(layout);
    }
    // SAFETY: runs nothing. The compiler has to take the memory for written by it.
    unsafe { asm!("/* {} */", inout(reg) memory, options(nostack, preserves_flags)) };
    // SAFETY: allocated for this many aligned pages and never freed; any bytes are valid words.
    unsafe { core::slice::from_raw_parts(memory.cast(), count) }
}
