//! Hot paths of images that no public item reaches alone, for the micro benchmarks of the root
//! package. Behind the feature `micro-benchmarks`, and no interface.
#![allow(unsafe_code)] // The source of a page is given by address.

use std::fs::File;
use std::sync::Arc;

use forkvm_vmm::memory::PAGE;

use super::store::{Store, StoreError};
use super::{MemoryImage, OwnerTable};
use crate::userfault::UserfaultError;

/// An owner table as a long line of forks leaves it.
pub struct Table {
    table: OwnerTable,
    image: Arc<MemoryImage>,
}

impl Table {
    /// Of `pages` pages of which every other is the image's own: as many runs as there can be.
    pub fn scattered(file: File, pages: u64) -> Table {
        let own: Vec<_> = (0..pages / 2)
            .map(|index| 2 * index * PAGE..(2 * index + 1) * PAGE)
            .collect();
        Table {
            table: OwnerTable::own(pages * PAGE, &own),
            image: MemoryImage::whole(Arc::new(file), pages * PAGE),
        }
    }

    /// Looks up who holds the page at `offset`; where its run ends.
    pub fn look_up(&self, offset: u64) -> u64 {
        self.table.at(offset).1.end
    }

    /// What a fork does with it: the copy that the next image begins with.
    pub fn copy(&self) -> usize {
        self.table.of(&self.image).with_own(&[]).populated().len()
    }
}

/// An image that pages come into.
pub struct Filling {
    store: Store,
}

impl Filling {
    /// An empty one of `len` bytes.
    pub fn empty(len: u64) -> Result<Filling, StoreError> {
        let store = Store::empty(len)?;
        Ok(Filling { store })
    }

    /// Puts `bytes` in at `offset`, where nothing is yet; how much came in.
    pub fn insert(&self, offset: u64, bytes: &[u8]) -> Result<u64, UserfaultError> {
        let range = offset..offset + bytes.len() as u64;
        let mut new = 0;
        // SAFETY: `bytes` is readable for its whole length, which is the range's.
        unsafe {
            self.store
                .insert(&range, bytes.as_ptr(), |part| new += part.end - part.start)?;
        }
        Ok(new)
    }
}
