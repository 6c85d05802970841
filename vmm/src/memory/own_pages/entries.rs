//! The way of every Linux: an entry of 64 bits for each page, read from /proc/self/pagemap
//! (Documentation/admin-guide/mm/pagemap.rst).
#![allow(unsafe_code)] // Maps one page, to learn where the kernel keeps its zeros.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::ptr;

use super::super::{MemoryError, PAGE};
use super::PageKind;

/// A page frame number.
pub(super) type Frame = u64;

const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
/// Of a file, or anonymous and shared.
const FILE: u64 = 1 << 61;
/// The page frame number of a page that is present; all zero for who may not see it.
const FRAME: u64 = (1 << 55) - 1;

/// Bytes read at once: 64 MiB of memory. A multiple of [`TABLE`].
const BATCH: usize = 128 * 1024;
/// Bytes of entries for what one page table maps.
const TABLE: usize = 4096;
const ENTRY: usize = 8;

/// Calls `each` for all pages of `mapping`, a range of whole pages of this process, that are there.
/// `zero_page` is the frame of the shared zero page, where it is known: without, such a page counts
/// as an own one.
pub(super) fn kinds(
    pagemap: &File,
    mapping: Range<u64>,
    zero_page: Option<Frame>,
    mut each: impl FnMut(Range<u64>, PageKind),
) -> Result<(), MemoryError> {
    let mut entries = vec![0; BATCH];
    let mut at = mapping.start;
    while at < mapping.end {
        let left = (mapping.end - at) / PAGE * ENTRY as u64;
        let entries = &mut entries[..left.min(BATCH as u64) as usize];
        pagemap
            .read_exact_at(entries, at / PAGE * ENTRY as u64)
            .map_err(|source| MemoryError::Populated {
                what: "reading /proc/self/pagemap",
                source,
            })?;
        for table in entries.chunks(TABLE) {
            if holds_pages(table) {
                for (index, entry) in decoded(table).enumerate() {
                    if entry & (PRESENT | SWAPPED) != 0 {
                        let start = at + index as u64 * PAGE;
                        each(start..start + PAGE, kind(entry, zero_page));
                    }
                }
            }
            at += (table.len() / ENTRY) as u64 * PAGE;
        }
    }
    Ok(())
}

fn kind(entry: u64, zero_page: Option<Frame>) -> PageKind {
    if entry & FILE != 0 {
        PageKind::File
    } else if entry & PRESENT != 0 && zero_page == Some(entry & FRAME) {
        PageKind::Zero
    } else {
        PageKind::Own
    }
}

/// Whether any of these entries is a page. Most are none, and this is much faster than to look at
/// each.
fn holds_pages(table: &[u8]) -> bool {
    decoded(table).fold(0, |all, entry| all | entry) & (PRESENT | SWAPPED) != 0
}

fn decoded(entries: &[u8]) -> impl Iterator<Item = u64> {
    entries
        .chunks_exact(ENTRY)
        .map(|entry| u64::from_ne_bytes(entry.try_into().expect("chunks of 8")))
}

/// The frame of the page of zeros that all mappings share: what an anonymous page shows that was
/// only read. `None` when this process may not see frames, or has no page to spare.
pub(super) fn zero_page(pagemap: &File) -> Option<Frame> {
    match read_only_page(pagemap) {
        Ok(0) => None,
        Ok(frame) => Some(frame),
        Err(error) => {
            tracing::debug!(%error, "the frame of the zero page is not known");
            None
        }
    }
}

fn read_only_page(pagemap: &File) -> io::Result<Frame> {
    let len = PAGE as usize;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a fresh mapping at an address of the kernel's choice.
    let page = unsafe { libc::mmap(ptr::null_mut(), len, libc::PROT_READ, flags, -1, 0) };
    if page == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the page was mapped above, readable. A volatile read is not left out.
    unsafe { page.cast::<u8>().read_volatile() };
    let mut entry = [0; ENTRY];
    let read = pagemap.read_exact_at(&mut entry, page as u64 / PAGE * ENTRY as u64);
    // SAFETY: the mapping is this function's own, and nothing refers to it any more.
    if unsafe { libc::munmap(page, len) } != 0 {
        return Err(io::Error::last_os_error());
    }
    read?;
    Ok(u64::from_ne_bytes(entry) & FRAME)
}
