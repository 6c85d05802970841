//! Which pages a private mapping of a memory file has of its own.
//!
//! An *own* page is one that the mapping has copied (or was given) and that its file does not show:
//! present or swapped out, not of the file, and not the shared zero page, which holds nothing. A
//! page under migration or compaction is a swap entry for a moment, without any swap: so swapped
//! counts everywhere. So does, therefore, what userfaultfd-wp leaves in place of a protected page
//! that was dropped, or puts where there is no page: a marker that cannot be told from a swap entry.
//! Who drops pages unprotects them first, and who protects takes own pages only.
//!
//! Linux 6.7 and later say it by the PAGEMAP_SCAN ioctl, which skips page tables that are not there
//! ([`scan`]); before, every page's entry in /proc/self/pagemap has to be read ([`entries`]). Both
//! give the same answer. It is exact for a machine that stands still; the freezes of the clone
//! engine ask in their pause, so time counts here.

mod entries;
mod scan;

use std::fs::File;
use std::ops::Range;
use std::sync::OnceLock;

use super::populated::extend;
use super::{Backing, MemoryError, Ram};
use scan::Wanted;

const PAGEMAP: &str = "/proc/self/pagemap";

impl Ram {
    /// The pages that a private mapping has for itself, as ranges of file offsets: rising, apart,
    /// each as long as can be. Empty for any other.
    ///
    /// A page that UFFDIO_ZEROPAGE has put into the mapping is not among them. Before Linux 6.7
    /// that takes CAP_SYS_ADMIN: a process that may not see page frame numbers gets such pages as
    /// its own. That is right, since they read as what they hold, but wasteful.
    pub fn own_pages(&self) -> Result<Vec<Range<u64>>, MemoryError> {
        let Backing::Private(_) = self.backing else {
            return Ok(Vec::new());
        };
        let pagemap = open()?;
        if can_scan(&pagemap) {
            self.pages_by(|mapping, add| scan::pages(&pagemap, mapping, Wanted::Own, add))
        } else {
            self.pages_by(|mapping, add| own_by_entries(&pagemap, mapping, add))
        }
    }

    /// Pages that are mapped just now, as ranges of file offsets: some of those that a shared
    /// mapping's file holds, found faster than by asking the file. None where that is not fast, as
    /// before Linux 6.7.
    pub(super) fn mapped_pages(&self) -> Result<Vec<Range<u64>>, MemoryError> {
        let pagemap = open()?;
        if can_scan(&pagemap) {
            self.pages_by(|mapping, add| scan::pages(&pagemap, mapping, Wanted::Mapped, add))
        } else {
            Ok(Vec::new())
        }
    }

    /// Asks `find` for pages of each region's mapping, a range of host addresses, and gathers the
    /// file offsets of those that it adds, by rising address.
    fn pages_by(
        &self,
        mut find: impl FnMut(Range<u64>, &mut dyn FnMut(Range<u64>)) -> Result<(), MemoryError>,
    ) -> Result<Vec<Range<u64>>, MemoryError> {
        let mut found = Vec::new();
        for (region, address) in self.host_ranges() {
            let first = address as u64;
            find(first..first + region.len, &mut |own| {
                let offset = |address| region.offset + (address - first);
                extend(&mut found, offset(own.start)..offset(own.end));
            })?;
        }
        Ok(found)
    }
}

/// What kind of page a mapping has somewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PageKind {
    /// Its own.
    Own,
    /// Of its file, shown just now.
    File,
    /// The shared zero page.
    Zero,
}

/// Calls `each` for all pages that `mapping`, a range of host addresses, has: rising, as long as can
/// be or page by page.
pub(super) fn page_kinds(
    mapping: Range<u64>,
    each: &mut dyn FnMut(Range<u64>, PageKind),
) -> Result<(), MemoryError> {
    let pagemap = open()?;
    if can_scan(&pagemap) {
        scan::kinds(&pagemap, mapping, each)
    } else {
        entries::kinds(&pagemap, mapping, zero_page(&pagemap), each)
    }
}

fn own_by_entries(
    pagemap: &File,
    mapping: Range<u64>,
    add: &mut dyn FnMut(Range<u64>),
) -> Result<(), MemoryError> {
    entries::kinds(pagemap, mapping, zero_page(pagemap), |pages, kind| {
        if kind == PageKind::Own {
            add(pages);
        }
    })
}

fn zero_page(pagemap: &File) -> Option<entries::Frame> {
    static ZERO_PAGE: OnceLock<Option<entries::Frame>> = OnceLock::new();
    *ZERO_PAGE.get_or_init(|| entries::zero_page(pagemap))
}

/// Opened at each call: 6 to 20 µs, and no descriptor that outlives a VM.
fn open() -> Result<File, MemoryError> {
    File::open(PAGEMAP).map_err(|source| MemoryError::Populated {
        what: "opening /proc/self/pagemap",
        source,
    })
}

fn can_scan(pagemap: &File) -> bool {
    static CAN_SCAN: OnceLock<bool> = OnceLock::new();
    *CAN_SCAN.get_or_init(|| scan::is_supported(pagemap))
}

#[cfg(test)]
mod tests;
