//! Guest RAM as what a memory file is written from.
//!
//! Reads through the machine's own mapping, so a private mapping shows the machine's own pages and,
//! where it has none, those of the image below. Only populated pages are read: to read a hole would
//! populate it.

use std::io;
use std::ops::Range;

use vm_memory::{Bytes, GuestAddress};

use super::{MemoryError, Ram};
use crate::memory_file::MemorySource;

/// The RAM of a paused machine, and where it holds something.
#[derive(Debug)]
pub struct RamSource<'a> {
    ram: &'a Ram,
    /// File offsets, rising and apart.
    populated: Vec<Range<u64>>,
}

impl Ram {
    /// Its content as it is now, to be saved. The machine must be paused as long as this is used.
    pub fn source(&self) -> Result<RamSource<'_>, MemoryError> {
        Ok(RamSource {
            ram: self,
            populated: self.populated()?,
        })
    }
}

impl MemorySource for RamSource<'_> {
    fn memory_len(&self) -> io::Result<u64> {
        Ok(self.ram.layout().len())
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let end = offset + into.len() as u64;
        for region in self.ram.layout().regions() {
            let part = offset.max(region.offset)..end.min(region.offset + region.len);
            if part.is_empty() {
                continue;
            }
            let bytes = &mut into[(part.start - offset) as usize..(part.end - offset) as usize];
            let address = GuestAddress(region.start + (part.start - region.offset));
            self.ram
                .guest()
                .read_slice(bytes, address)
                .map_err(io::Error::other)?;
        }
        Ok(())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let next = self.populated.partition_point(|range| range.end <= offset);
        let found = self.populated.get(next);
        Ok(found.map(|range| range.start.max(offset)..range.end))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::sync::Arc;

    use super::super::{Backing, MemoryLayout, memfd};
    use super::*;
    use crate::memory_file::{self, MemoryFile};
    use crate::state_file::SaveId;

    fn save_and_load(ram: &Ram) -> Ram {
        let file = tempfile::tempfile().unwrap();
        let save = SaveId::random().unwrap();
        let source = ram.source().unwrap();
        memory_file::write(&file, save, &source, &mut |_| {}).unwrap();
        let fresh = Ram::new(ram.layout().clone()).unwrap();
        MemoryFile::open(file, "test")
            .unwrap()
            .load_into(fresh.backing().shared().unwrap(), &mut |_| {})
            .unwrap();
        fresh
    }

    fn byte(ram: &Ram, address: u64) -> u8 {
        ram.guest().read_obj(GuestAddress(address)).unwrap()
    }

    #[test]
    fn a_private_machine_is_saved_with_its_own_pages_over_those_of_its_image() {
        let layout = MemoryLayout::new(64).unwrap();
        let image = memfd(c"test", layout.len()).unwrap();
        image.write_all_at(&[7; 8192], 0x10000).unwrap();
        let ram = Ram::map(layout, Backing::Private(Arc::new(Arc::new(image)))).unwrap();
        ram.guest().write_obj(8u8, GuestAddress(0x11000)).unwrap();
        ram.guest().write_obj(9u8, GuestAddress(0x20000)).unwrap();
        let loaded = save_and_load(&ram);
        assert_eq!(byte(&loaded, 0x10000), 7);
        assert_eq!(byte(&loaded, 0x11000), 8);
        assert_eq!(byte(&loaded, 0x20000), 9);
        assert_eq!(byte(&loaded, 0x30000), 0);
    }

    #[test]
    fn ram_above_4_gib_is_saved_where_it_is() {
        let ram = Ram::new(MemoryLayout::new(4096).unwrap()).unwrap();
        ram.guest()
            .write_obj(1u8, GuestAddress(0xbfff_ffff))
            .unwrap();
        ram.guest()
            .write_obj(2u8, GuestAddress(0x1_0000_0000))
            .unwrap();
        let loaded = save_and_load(&ram);
        assert_eq!(byte(&loaded, 0xbfff_ffff), 1);
        assert_eq!(byte(&loaded, 0x1_0000_0000), 2);
    }
}
