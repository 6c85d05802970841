//! Memory pages of which this VM knows what each holds, while vCPUs rewrite them.
//!
//! A page holds its number, its tag (how often it was written, and a salt that each VM of a family
//! chooses anew after a fork), a hash of its body, and the body, which follows from number and tag.
//! The tags stand in an array apart. A page that is torn, stale or another VM's shows.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::pages::{self, Page, WORDS};
use crate::random::mix;

/// What a tag grows by at each write; below it is the salt.
const VERSION: u64 = 1 << 32;
/// Words of a page's header.
const NUMBER: usize = 0;
const TAG: usize = 1;
const HASH: usize = 2;
const BODY: usize = 3;

/// The pages and their tags. A page is written by one vCPU at a time.
pub struct VersionedPages {
    pages: &'static [Page],
    tags: Vec<AtomicU64>,
    salt: AtomicU64,
}

impl VersionedPages {
    /// `count` pages that have not been written yet.
    pub fn new(count: usize, salt: u64) -> VersionedPages {
        let tags = (0..count).map(|_| AtomicU64::new(0)).collect();
        VersionedPages {
            pages: pages::allocate(count),
            tags,
            salt: AtomicU64::new(salt % VERSION),
        }
    }

    /// Number of pages.
    pub fn len(&self) -> usize {
        self.pages.len()
    }

    /// Makes what is written from now on differ from what others write.
    pub fn set_salt(&self, salt: u64) {
        self.salt.store(salt % VERSION, Ordering::Relaxed);
    }

    /// Writes page `number` once more.
    pub fn write(&self, number: usize) {
        let (page, old) = (
            &self.pages[number],
            self.tags[number].load(Ordering::Relaxed),
        );
        let tag = (old / VERSION + 1) * VERSION + self.salt.load(Ordering::Relaxed);
        page.set(NUMBER, number as u64);
        page.set(TAG, tag);
        let mut hash = 0u64;
        for index in BODY..WORDS {
            let word = body(number, tag, index);
            page.set(index, word);
            hash = hash.wrapping_add(word);
        }
        page.set(HASH, hash);
        self.tags[number].store(tag, Ordering::Relaxed);
    }

    /// Checks page `number`; the error says what differs.
    pub fn check(&self, number: usize) -> Result<(), String> {
        let (page, tag) = (
            &self.pages[number],
            self.tags[number].load(Ordering::Relaxed),
        );
        let header = [page.get(NUMBER), page.get(TAG)];
        if header != [number as u64, tag] {
            return Err(format!(
                "page {number}: header {header:x?}, not [{number:x}, {tag:x}]"
            ));
        }
        let mut hash = 0u64;
        for index in BODY..WORDS {
            let (found, expected) = (page.get(index), body(number, tag, index));
            if found != expected {
                return Err(format!(
                    "page {number} word {index}: {found:#x}, not {expected:#x}"
                ));
            }
            hash = hash.wrapping_add(found);
        }
        if page.get(HASH) != hash {
            return Err(format!(
                "page {number}: hash {:#x}, not {hash:#x}",
                page.get(HASH)
            ));
        }
        Ok(())
    }
}

fn body(number: usize, tag: u64, index: usize) -> u64 {
    mix(tag ^ (number * WORDS + index) as u64)
}
