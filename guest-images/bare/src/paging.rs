//! Page tables: everything is mapped where it is, for ring 3, in 2 MiB pages.
//!
//! The low 4 GiB are data of the image, so the first instructions find them ready: RAM cached, the
//! window from [`forkvm_abi::LOW_RAM_END`] to 4 GiB (devices) uncached. RAM above 4 GiB is added by
//! [`map_high`]. 1 GiB pages are not used: whether a guest may have them is not told reliably by
//! CPUID on a KVM that runs ring 3 natively. Accessed and dirty bits are set beforehand, so that no
//! walk has to write them: a clone need not copy its page tables.

#![allow(unsafe_code)] // Tables that the CPU reads.

use core::sync::atomic::{AtomicU64, Ordering};

use alloc::boxed::Box;

use forkvm_abi::{HIGH_RAM_START, LOW_RAM_END};

use crate::pages::{self, Page};

/// Entries of a table.
const ENTRIES: usize = 512;
/// Bytes that an entry of a page directory maps.
const LARGE_PAGE: u64 = 2 << 20;
/// Bytes that a page directory maps.
const DIRECTORY: u64 = 1 << 30;

/// Present, writable, user, accessed, dirty.
const TABLE: u64 = 0x67;
/// The same, as a 2 MiB page.
const PAGE: u64 = TABLE | 1 << 7;
/// Strongly uncached: write-through and cache-disable.
const UNCACHED: u64 = 3 << 3;

/// A table of any level (Intel SDM volume 3, chapter 4.5).
#[repr(C, align(4096))]
pub struct Table([Entry; ENTRIES]);

/// An entry, or the address of a table with the bits of an entry added by the linker.
#[repr(C)]
union Entry {
    bits: core::mem::ManuallyDrop<AtomicU64>,
    table: *const u8,
}

// SAFETY: a pointer in an entry is a number to the CPU; nothing follows it.
unsafe impl Sync for Table {}

impl Table {
    const fn new() -> Table {
        Table(
            [const {
                Entry {
                    bits: core::mem::ManuallyDrop::new(AtomicU64::new(0)),
                }
            }; ENTRIES],
        )
    }

    /// A directory that maps 1 GiB from `start` with the page bits `bits`.
    const fn directory(start: u64, bits: u64) -> Table {
        let mut table = Table::new();
        let mut index = 0;
        while index < ENTRIES {
            let entry = (start + index as u64 * LARGE_PAGE) | bits;
            table.0[index].bits = core::mem::ManuallyDrop::new(AtomicU64::new(entry));
            index += 1;
        }
        table
    }

    /// Points entry `index` to the static table `next`.
    const fn link(mut self, index: usize, next: *const Table) -> Table {
        self.0[index].table = next.cast::<u8>().wrapping_add(TABLE as usize);
        self
    }

    fn set(&self, index: usize, entry: u64) {
        // SAFETY: every bit pattern is a valid `u64`.
        unsafe { &self.0[index].bits }.store(entry, Ordering::Release);
    }
}

static LOW: [Table; 4] = [
    Table::directory(0, PAGE),
    Table::directory(DIRECTORY, PAGE),
    Table::directory(2 * DIRECTORY, PAGE),
    Table::directory(3 * DIRECTORY, PAGE | UNCACHED),
];
const _: () = assert!(LOW_RAM_END == 3 * DIRECTORY && HIGH_RAM_START == 4 * DIRECTORY);

static PDPT: Table = Table::new()
    .link(0, &raw const LOW[0])
    .link(1, &raw const LOW[1])
    .link(2, &raw const LOW[2])
    .link(3, &raw const LOW[3]);

/// Root of the page tables of every vCPU.
pub static PML4: Table = Table::new().link(0, &raw const PDPT);

/// Addresses of 2 MiB that pages of the low 4 GiB are shown at, one by one; far from where everything is.
pub struct Window {
    table: &'static Table,
}

impl Window {
    /// Where windows are: an address that only this job's tables know.
    const START: u64 = 1 << 39;
    /// Pages of a window.
    pub const PAGES: usize = ENTRIES;

    /// Nothing is shown yet. There is one window.
    pub fn open() -> Window {
        let table: &Table = Box::leak(Box::new(Table::new()));
        let directory: &Table = Box::leak(Box::new(Table::new()));
        let pointers: &Table = Box::leak(Box::new(Table::new()));
        directory.set(0, (&raw const *table).addr() as u64 | TABLE);
        pointers.set(0, (&raw const *directory).addr() as u64 | TABLE);
        PML4.set(1, (&raw const *pointers).addr() as u64 | TABLE);
        Window { table }
    }

    /// Shows `page` at place `index`, once translations are flushed
    /// ([`flush_translations`](crate::ring0::flush_translations)).
    pub fn show(&self, index: usize, page: &'static Page) {
        self.table
            .set(index, (&raw const *page).addr() as u64 | TABLE);
    }

    /// What is seen at place `index`, where a page is shown.
    pub fn page(&self, index: usize) -> &'static Page {
        let address = Window::START as usize + index * pages::PAGE;
        // SAFETY: a page that lives for good is shown there, which any vCPU may read and write.
        unsafe { &*core::ptr::with_exposed_provenance(address) }
    }
}

/// Maps RAM up to `end` (an address above 4 GiB, at most 512 GiB) from the heap below 4 GiB.
/// Called once, before that RAM is used.
pub fn map_high(end: u64) {
    for gib in HIGH_RAM_START / DIRECTORY..end.div_ceil(DIRECTORY).min(ENTRIES as u64) {
        let directory = Box::leak(Box::new(Table::directory(gib * DIRECTORY, PAGE)));
        // An entry that was not present is not cached by a TLB: nothing to flush.
        PDPT.set(gib as usize, (&raw const *directory).addr() as u64 | TABLE);
    }
}
