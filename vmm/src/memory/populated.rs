//! Which pages of guest RAM hold something, and how they are read out.
//!
//! A page is populated when the file behind the RAM has it, or when a private mapping has a copy of
//! its own. Everything else is a hole and reads as zero. Called with the machine paused: the
//! answer is exact for that instant.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use super::{Backing, MemoryError, Ram};
use crate::memory_file::seek;

impl Ram {
    /// The populated pages as ranges of file offsets, rising and apart.
    pub fn populated(&self) -> Result<Vec<Range<u64>>, MemoryError> {
        match &self.backing {
            Backing::Reserved => Ok(Vec::new()),
            Backing::Shared(file) => data_extents_beside(file, &self.mapped_pages()?),
            Backing::Private(base) => Ok(union(base.populated()?, self.own_pages()?)),
        }
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

/// The extents of `file` that hold data, as ranges of file offsets, rising and apart.
pub fn data_extents(file: &File) -> Result<Vec<Range<u64>>, MemoryError> {
    data_extents_beside(file, &[])
}

/// The same, where the ranges `known` (rising and apart) are sure to hold data. The file is asked
/// for the rest only: the kernel looks at each page of an extent to find its end, which takes
/// milliseconds of a pause for a machine's RAM.
fn data_extents_beside(file: &File, known: &[Range<u64>]) -> Result<Vec<Range<u64>>, MemoryError> {
    let find = |at, whence| {
        seek(file, at, whence).map_err(|source| MemoryError::Populated {
            what: "looking for data in a memfd",
            source,
        })
    };
    let mut extents = Vec::new();
    let mut known = known.iter().peekable();
    let mut at = 0;
    loop {
        while known.next_if(|range| range.end <= at).is_some() {}
        let next = known.peek().map_or(u64::MAX, |range| range.start);
        if let Some(range) = known.next_if(|range| range.start <= at) {
            extend(&mut extents, at..range.end);
            at = range.end;
            continue;
        }
        let Some(start) = find(at, libc::SEEK_DATA)? else {
            return Ok(extents);
        };
        if start >= next {
            at = next;
            continue;
        }
        // This may end in the midst of known ranges, or behind them; a hole ends every file.
        let Some(end) = find(start, libc::SEEK_HOLE)? else {
            return Ok(extents);
        };
        extend(&mut extents, start..end);
        at = end;
    }
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
pub(super) fn extend(ranges: &mut Vec<Range<u64>>, range: Range<u64>) {
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
    use std::os::unix::fs::FileExt;
    use std::slice::from_ref;

    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    use super::super::{MemoryLayout, PAGE, memfd};
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

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn a_page_of_shared_ram_is_populated_whether_or_not_it_is_mapped(
            through_ram in prop::collection::btree_set(0..600u64, 0..200),
            through_file in prop::collection::btree_set(0..600u64, 0..200),
        ) {
            let ram = ram(16);
            for page in &through_ram {
                ram.guest().write_obj(1u8, GuestAddress(page * PAGE)).unwrap();
            }
            let file = ram.backing().shared().unwrap();
            for page in &through_file {
                file.write_all_at(&[1], page * PAGE).unwrap();
            }
            let mut expected = Vec::new();
            for page in through_ram.union(&through_file) {
                extend(&mut expected, page * PAGE..(page + 1) * PAGE);
            }
            prop_assert_eq!(&ram.populated().unwrap(), &expected);
            prop_assert_eq!(&data_extents(file).unwrap(), &expected);
        }
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
        let ram = Ram::map(layout, Backing::Private(Arc::new(Arc::new(file)))).unwrap();
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
        let ram = Ram::map(layout.clone(), Backing::Private(Arc::new(Arc::new(file)))).unwrap();
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
        let file = ram.backing().shared().unwrap().clone();
        ram.remap(Backing::Private(Arc::new(file.clone()))).unwrap();
        assert_eq!(ram.guest().read_obj::<u8>(GuestAddress(0x5000)).unwrap(), 1);
        ram.guest().write_obj(2u8, GuestAddress(0x5000)).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, 0x5000).unwrap();
        assert_eq!(byte, [1]);
    }
}
