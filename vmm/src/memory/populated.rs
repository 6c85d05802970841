//! Which pages of guest RAM hold something, and how they are read out.
//!
//! A page is populated when the file behind the RAM has it, or when a private mapping has a copy of
//! its own. Everything else is a hole and reads as zero. Called with the machine paused: the
//! answer is exact for that instant.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use super::{Backing, MemoryError, PAGE, Ram};
use crate::memory_file::MemorySource;

impl Ram {
    /// The populated pages as ranges of file offsets, rising and apart.
    pub fn populated(&self) -> Result<Vec<Range<u64>>, MemoryError> {
        let in_file = data_extents(self.backing.file())?;
        match self.backing {
            Backing::Shared(_) => Ok(in_file),
            Backing::Private(_) => Ok(union(in_file, self.own_pages()?)),
        }
    }

    /// The pages that a private mapping has copied for itself, as ranges of file offsets. Empty for
    /// a shared mapping.
    pub fn own_pages(&self) -> Result<Vec<Range<u64>>, MemoryError> {
        let mut found = Vec::new();
        if let Backing::Shared(_) = self.backing {
            return Ok(found);
        }
        let pagemap = File::open("/proc/self/pagemap").map_err(pagemap_error)?;
        let mut entries = vec![0u8; 8 * PAGEMAP_BATCH];
        for (region, address) in self.host_ranges() {
            let pages = region.len / PAGE;
            let first = address as u64 / PAGE;
            let mut at = 0;
            while at < pages {
                let count = (pages - at).min(PAGEMAP_BATCH as u64);
                let bytes = &mut entries[..8 * count as usize];
                pagemap
                    .read_exact_at(bytes, 8 * (first + at))
                    .map_err(pagemap_error)?;
                for (index, entry) in bytes.chunks_exact(8).enumerate() {
                    let entry = u64::from_ne_bytes(entry.try_into().expect("chunks of 8"));
                    if is_own(entry) {
                        let start = region.offset + (at + index as u64) * PAGE;
                        extend(&mut found, start..start + PAGE);
                    }
                }
                at += count;
            }
        }
        Ok(found)
    }

    /// Writes the populated pages to `to`, an empty file as long as the RAM, at their offsets.
    /// Returns the bytes written.
    pub fn copy_populated(&self, to: &File) -> Result<u64, MemoryError> {
        let mut copied = 0;
        let ranges = self.populated()?;
        for (region, address) in self.host_ranges() {
            let end = region.offset + region.len;
            for range in &ranges {
                let (from, until) = (range.start.max(region.offset), range.end.min(end));
                if from < until {
                    let start = address.wrapping_add((from - region.offset) as usize);
                    write_from(to, start, (until - from) as usize, from)?;
                    copied += until - from;
                }
            }
        }
        Ok(copied)
    }
}

/// Entries of /proc/self/pagemap read at once.
const PAGEMAP_BATCH: usize = 16 * 1024;

/// Whether a pagemap entry is a page that the private mapping owns: present (bit 63) or swapped
/// (bit 62; a page under migration looks like that for a moment), and not of the file (bit 61).
/// The shared zero page does not occur in a file mapping.
fn is_own(entry: u64) -> bool {
    const PRESENT: u64 = 1 << 63;
    const SWAPPED: u64 = 1 << 62;
    const FILE: u64 = 1 << 61;
    entry & (PRESENT | SWAPPED) != 0 && entry & FILE == 0
}

fn pagemap_error(source: io::Error) -> MemoryError {
    MemoryError::Populated {
        what: "reading /proc/self/pagemap",
        source,
    }
}

/// The extents of `file` that hold data.
fn data_extents(file: &File) -> Result<Vec<Range<u64>>, MemoryError> {
    let failed = |source| MemoryError::Populated {
        what: "looking for data in a memfd",
        source,
    };
    let mut extents: Vec<Range<u64>> = Vec::new();
    let end = |extents: &[Range<u64>]| extents.last().map_or(0, |last| last.end);
    while let Some(extent) = file.next_data(end(&extents)).map_err(failed)? {
        extents.push(extent);
    }
    Ok(extents)
}

/// Writes guest memory to a file without a buffer in between: the kernel reads it like any other
/// writer would, so a page that changes meanwhile is a page that some instant had.
fn write_from(
    to: &File,
    mut start: *mut u8,
    mut len: usize,
    mut offset: u64,
) -> Result<(), MemoryError> {
    while len > 0 {
        // SAFETY: `start..start + len` lies in a mapping that the caller's `Ram` owns; the kernel
        // only reads it.
        let written =
            unsafe { libc::pwrite(to.as_raw_fd(), start.cast(), len, offset as libc::off_t) };
        match written {
            ..0 => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(MemoryError::Copy(error));
                }
            }
            0 => return Err(MemoryError::Copy(io::ErrorKind::WriteZero.into())),
            written => {
                start = start.wrapping_add(written as usize);
                len -= written as usize;
                offset += written as u64;
            }
        }
    }
    Ok(())
}

/// Adds a range that begins at or after the end of the last one.
fn extend(ranges: &mut Vec<Range<u64>>, range: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
        _ => ranges.push(range),
    }
}

fn union(a: Vec<Range<u64>>, b: Vec<Range<u64>>) -> Vec<Range<u64>> {
    let mut all = a;
    all.extend(b);
    all.sort_by_key(|range| range.start);
    let mut merged = Vec::with_capacity(all.len());
    for range in all {
        extend(&mut merged, range);
    }
    merged
}

#[cfg(test)]
mod tests {
    use std::slice::from_ref;

    use vm_memory::{Bytes, GuestAddress};

    use super::super::{MemoryLayout, memfd};
    use super::*;
    use std::sync::Arc;

    fn ram(mib: u64) -> Ram {
        Ram::new(MemoryLayout::new(mib).unwrap()).unwrap()
    }

    #[test]
    fn untouched_ram_holds_no_page() {
        assert_eq!(ram(64).populated().unwrap(), []);
    }

    #[test]
    fn a_written_page_of_shared_ram_is_populated() {
        let ram = ram(64);
        ram.guest().write_obj(1u8, GuestAddress(0x5123)).unwrap();
        assert_eq!(ram.populated().unwrap(), from_ref(&(0x5000..0x6000)));
    }

    #[test]
    fn ram_beyond_3_gib_is_found_at_its_file_offset() {
        let ram = ram(4096);
        ram.guest()
            .write_obj(1u8, GuestAddress(0x1_0000_0000))
            .unwrap();
        assert_eq!(
            ram.populated().unwrap(),
            from_ref(&(0xc000_0000..0xc000_1000))
        );
    }

    #[test]
    fn private_ram_holds_the_pages_of_its_file_and_those_it_copied() {
        let layout = MemoryLayout::new(64).unwrap();
        let file = memfd(c"test", layout.len()).unwrap();
        file.write_all_at(&[7; 8192], 0x10000).unwrap();
        let ram = Ram::map(layout, Backing::Private(Arc::new(file))).unwrap();
        assert_eq!(
            ram.guest().read_obj::<u8>(GuestAddress(0x10000)).unwrap(),
            7
        );
        assert_eq!(ram.own_pages().unwrap(), [], "a read copies nothing");
        ram.guest().write_obj(8u8, GuestAddress(0x11000)).unwrap();
        ram.guest().write_obj(9u8, GuestAddress(0x20000)).unwrap();
        assert_eq!(
            ram.own_pages().unwrap(),
            [0x11000..0x12000, 0x20000..0x21000]
        );
        assert_eq!(
            ram.populated().unwrap(),
            [0x10000..0x12000, 0x20000..0x21000]
        );
    }

    #[test]
    fn a_copy_holds_what_the_private_mapping_reads() {
        let layout = MemoryLayout::new(64).unwrap();
        let file = memfd(c"test", layout.len()).unwrap();
        file.write_all_at(&[7; 8192], 0x10000).unwrap();
        let ram = Ram::map(layout.clone(), Backing::Private(Arc::new(file))).unwrap();
        ram.guest().write_obj(8u8, GuestAddress(0x11000)).unwrap();
        let copy = memfd(c"copy", layout.len()).unwrap();
        assert_eq!(ram.copy_populated(&copy).unwrap(), 8192);
        let mut bytes = [0; 2];
        copy.read_exact_at(&mut bytes, 0x10fff).unwrap();
        assert_eq!(bytes, [7, 8]);
    }

    #[test]
    fn a_remap_keeps_the_content_and_takes_later_writes_off_the_file() {
        let mut ram = ram(64);
        ram.guest().write_obj(1u8, GuestAddress(0x5000)).unwrap();
        let file = ram.backing().file().clone();
        ram.remap(Backing::Private(file.clone())).unwrap();
        assert_eq!(ram.guest().read_obj::<u8>(GuestAddress(0x5000)).unwrap(), 1);
        ram.guest().write_obj(2u8, GuestAddress(0x5000)).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, 0x5000).unwrap();
        assert_eq!(byte, [1]);
    }
}
