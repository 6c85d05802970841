//! The way of Linux 6.7 and later: PAGEMAP_SCAN (linux/fs.h), asked of /proc/self/pagemap.
#![allow(unsafe_code)] // An ioctl that fills a buffer.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use super::super::{MemoryError, PAGE};
use super::PageKind;

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;

const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;

/// Ranges that one call returns at most. The kernel stores 512 of them at a time anyway.
const BATCH: usize = 2048;

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// Which pages are looked for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Wanted {
    /// The mapping's own: present or swapped, neither of the file nor the zero page.
    Own,
    /// Those that are mapped just now.
    Mapped,
    /// All that are there, each with its kind.
    ByKind,
}

/// Whether this kernel has the call.
pub(super) fn is_supported(pagemap: &File) -> bool {
    scan(pagemap, 0..PAGE, Wanted::Own, &mut [PageRegion::default()]).is_ok()
}

/// Adds the wanted pages of `mapping`, a range of whole pages of this process.
pub(super) fn pages(
    pagemap: &File,
    mapping: Range<u64>,
    wanted: Wanted,
    add: &mut dyn FnMut(Range<u64>),
) -> Result<(), MemoryError> {
    regions(pagemap, mapping, wanted, &mut |region| {
        add(region.start..region.end);
    })
}

/// Adds all pages of `mapping` that are there, with their kinds.
pub(super) fn kinds(
    pagemap: &File,
    mapping: Range<u64>,
    add: &mut dyn FnMut(Range<u64>, PageKind),
) -> Result<(), MemoryError> {
    regions(pagemap, mapping, Wanted::ByKind, &mut |region| {
        let kind = if region.categories & PAGE_IS_FILE != 0 {
            PageKind::File
        } else if region.categories & PAGE_IS_PFNZERO != 0 {
            PageKind::Zero
        } else {
            PageKind::Own
        };
        add(region.start..region.end, kind);
    })
}

fn regions(
    pagemap: &File,
    mapping: Range<u64>,
    wanted: Wanted,
    add: &mut dyn FnMut(&PageRegion),
) -> Result<(), MemoryError> {
    let mut regions = vec![PageRegion::default(); BATCH];
    let mut at = mapping.start;
    loop {
        let count = scan(pagemap, at..mapping.end, wanted, &mut regions).map_err(|source| {
            MemoryError::Populated {
                what: "PAGEMAP_SCAN of guest RAM",
                source,
            }
        })?;
        regions[..count].iter().for_each(&mut *add);
        // Not by `walk_end`: it is stale once the kernel's own buffer has been through twice.
        // Fewer than asked for are all there are; else what comes after the last one is unknown.
        match regions[..count].last() {
            Some(last) if count == regions.len() => at = last.end,
            _ => return Ok(()),
        }
    }
}

/// One call: returns how many of `regions` it filled, by rising address.
fn scan(
    pagemap: &File,
    range: Range<u64>,
    wanted: Wanted,
    regions: &mut [PageRegion],
) -> io::Result<usize> {
    const THERE: u64 = PAGE_IS_PRESENT | PAGE_IS_SWAPPED;
    const NOT_OWN: u64 = PAGE_IS_FILE | PAGE_IS_PFNZERO;
    // Where no category is reported, neighbours make one range whatever else they are.
    let (none_of, any_of, reported) = match wanted {
        Wanted::Own => (NOT_OWN, THERE, 0),
        Wanted::Mapped => (0, PAGE_IS_PRESENT, 0),
        Wanted::ByKind => (0, THERE, NOT_OWN),
    };
    let mut arg = ScanArg {
        size: size_of::<ScanArg>() as u64,
        start: range.start,
        end: range.end,
        vec: regions.as_mut_ptr() as u64,
        vec_len: regions.len() as u64,
        category_inverted: none_of,
        category_mask: none_of,
        category_anyof_mask: any_of,
        return_mask: reported,
        ..ScanArg::default()
    };
    // SAFETY: the kernel writes at most `vec_len` regions to `vec`, both those of `regions`, and
    // walk_end of `arg`, which has the size that it says. Without flags it changes no page.
    let count = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}
