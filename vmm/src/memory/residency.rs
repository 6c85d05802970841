//! What a machine's RAM takes of the host's memory just now, counted page by page.
//!
//! For accounting: the machine runs on while it is counted, so the numbers are of about now, and a page
//! that it writes meanwhile may count as it was or as it is. What a freeze needs to know exactly is
//! asked of [`Ram::own_pages`] and [`Ram::populated`] in a pause.

use super::own_pages::{PageKind, page_kinds};
use super::{Backing, MemoryError, PAGE, Ram};

/// What the tables map that one page of the next level is for (Intel SDM 3A, 4.5): the last level and
/// the one above it. A third one maps 512 GiB and is shared with the rest of the process.
const TABLE_SPANS: [u64; 2] = [2 << 20, 1 << 30];

/// Bytes of host memory that belong to the mapping of one machine's RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Residency {
    /// Pages that the mapping has for itself, present or swapped out: what a private mapping has
    /// copied. None for a shared one, whose pages are all its file's.
    pub own: u64,
    /// Pages of the files below that the mapping shows just now: they were touched, and are there for
    /// everybody who maps those files.
    pub shown: u64,
    /// Page tables of this process that these pages need, and those of the shared zero page. A table at
    /// the border of two mappings counts for both; tables that are empty by now do not count.
    pub page_tables: u64,
}

impl Ram {
    /// Counts it. Walks the page tables of the RAM: 10 us for an idle clone, 1 ms for each 256 MiB that
    /// is mapped; before Linux 6.7 1 ms more for each 512 MiB of RAM.
    pub fn residency(&self) -> Result<Residency, MemoryError> {
        let mut residency = Residency::default();
        let private = matches!(self.backing, Backing::Private(_));
        for (region, address) in self.host_ranges() {
            let first = address as u64;
            // The first address that no table counted so far maps, by level.
            let mut beyond = TABLE_SPANS.map(|_| 0);
            page_kinds(first..first + region.len, &mut |pages, kind| {
                let bytes = pages.end - pages.start;
                match kind {
                    PageKind::Own if private => residency.own += bytes,
                    PageKind::Own | PageKind::File => residency.shown += bytes,
                    PageKind::Zero => {}
                }
                for (span, beyond) in TABLE_SPANS.iter().zip(&mut beyond) {
                    let start = (pages.start / span).max(*beyond / span);
                    let end = pages.end.div_ceil(*span);
                    residency.page_tables += end.saturating_sub(start) * PAGE;
                    *beyond = (*beyond).max(end * span);
                }
            })?;
        }
        Ok(residency)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::os::unix::fs::FileExt;
    use std::sync::Arc;

    use vm_memory::{Bytes, GuestAddress};

    use super::super::{MemoryLayout, memfd};
    use super::*;

    fn clone_of(pages: u64) -> Ram {
        let layout = MemoryLayout::new(64).unwrap();
        let file = memfd(c"test", layout.len()).unwrap();
        for page in 0..pages {
            file.write_all_at(&[1], page * PAGE).unwrap();
        }
        Ram::map(layout, Backing::Private(Arc::new(Arc::new(file)))).unwrap()
    }

    fn read(ram: &Ram, page: u64) {
        ram.guest()
            .read_obj::<u8>(GuestAddress(page * PAGE))
            .unwrap();
    }

    fn write(ram: &Ram, page: u64) {
        ram.guest()
            .write_obj(9u8, GuestAddress(page * PAGE))
            .unwrap();
    }

    #[test]
    fn a_mapping_that_nobody_touched_takes_nothing() {
        assert_eq!(clone_of(100).residency().unwrap(), Residency::default());
    }

    #[test]
    fn pages_that_were_read_are_the_files_and_those_written_its_own() {
        let ram = clone_of(100);
        (0..40).for_each(|page| read(&ram, page));
        (30..50).for_each(|page| write(&ram, page));
        let residency = ram.residency().unwrap();
        assert_eq!(residency.own, 20 * PAGE);
        // The kernel maps neighbours of a page that is read, as far as the file has them.
        assert!(
            (30 * PAGE..=80 * PAGE).contains(&residency.shown),
            "{residency:?}"
        );
    }

    #[test]
    fn each_table_counts_once_however_many_pages_it_maps() {
        let ram = clone_of(0);
        let (_, address) = ram.host_ranges().next().unwrap();
        let mut tables = BTreeSet::new();
        for page in [0, 1, 7, 511, 512, 513, 512 * 9, 512 * 9 + 300, 16383] {
            write(&ram, page);
            let at = address as u64 + page * PAGE;
            tables.extend(TABLE_SPANS.map(|span| (span, at / span)));
            let counted = ram.residency().unwrap().page_tables;
            assert_eq!(counted, tables.len() as u64 * PAGE, "with page {page}");
        }
    }

    #[test]
    fn pages_of_a_shared_mapping_are_its_files() {
        let ram = Ram::new(MemoryLayout::new(64).unwrap()).unwrap();
        (0..10).for_each(|page| write(&ram, page));
        let residency = ram.residency().unwrap();
        assert_eq!((residency.own, residency.shown), (0, 10 * PAGE));
    }
}
