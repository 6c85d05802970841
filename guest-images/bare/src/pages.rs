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
/// Pages that a host fetches and checks together, by default: 64 KiB.
pub const PER_CHUNK: usize = (64 << 10) / PAGE;
/// Words of a page that [`Page::stamp`] writes: the first, the last, and between.
const STAMPS: [usize; 8] = [0, 73, 146, 219, 292, 365, 438, WORDS - 1];
/// Words of a cache line.
const LINE: usize = 8;

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

    /// Writes `value` at eight places, spread from the first word to the last, and nothing else.
    pub fn stamp(&self, value: u64) {
        STAMPS.iter().for_each(|&index| self.set(index, value));
    }

    /// The index of the first place that does not hold what [`Page::stamp`] wrote.
    pub fn check_stamp(&self, value: u64) -> Result<(), usize> {
        first_wrong(STAMPS.iter().find(|&&index| self.get(index) != value))
    }

    /// Fills the first word of every cache line with what follows from `number`.
    pub fn fill_lines(&self, number: u64) {
        lines(number).for_each(|(index, value)| self.set(index, value));
    }

    /// The index of the first word that does not hold what [`Page::fill_lines`] wrote.
    pub fn check_lines(&self, number: u64) -> Result<(), usize> {
        let wrong = lines(number).find(|&(index, value)| self.get(index) != value);
        first_wrong(wrong.map(|(index, _)| index).as_ref())
    }

    /// The index of the first word that is not zero.
    pub fn check_zero(&self) -> Result<(), usize> {
        first_wrong((0..WORDS).find(|&index| self.get(index) != 0).as_ref())
    }
}

fn first_wrong(index: Option<&usize>) -> Result<(), usize> {
    index.map_or(Ok(()), |&index| Err(index))
}

/// The words that [`Page::fill_lines`] writes: cheap, for where the time of a page counts.
fn lines(number: u64) -> impl Iterator<Item = (usize, u64)> {
    let base = random::mix(number);
    (0..WORDS)
        .step_by(LINE)
        .map(move |index| (index, base.wrapping_add(index as u64)))
}

/// What [`Page::fill`] writes to word `index`.
pub fn word(seed: u64, number: u64, index: usize) -> u64 {
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

/// [`allocate`], from the start of a chunk on.
pub fn allocate_chunks(count: usize) -> &'static [Page] {
    let pages = allocate(count + PER_CHUNK);
    let frame = pages.as_ptr().addr() / PAGE;
    let start = frame.next_multiple_of(PER_CHUNK) - frame;
    &pages[start..start + count]
}
