//! A disk, or a part of one, of which this VM knows what every sector holds.
//!
//! A sector's content follows from its number and its tag: how often it was written, and a salt
//! that each VM of a family chooses anew after a fork. A write that was lost, done twice, or done
//! by another VM shows.

use alloc::vec;
use alloc::vec::Vec;

use crate::random::{Random, mix};
use crate::virtio_blk::{Disk, DiskError, SECTOR, Wait};

/// Most sectors of one request.
const MOST: u64 = 64;
/// What a tag grows by at each write; below it is the salt.
const VERSION: u64 = 1 << 32;

/// The first sectors of a disk, and their tags.
pub struct VersionedDisk<'a> {
    disk: &'a Disk,
    tags: Vec<u64>,
    salt: u64,
    random: Random,
}

impl<'a> VersionedDisk<'a> {
    /// Writes the first `bytes` bytes of `disk`, or all of it if it has fewer.
    pub fn fill(disk: &'a Disk, bytes: u64, seed: u64) -> Result<VersionedDisk<'a>, DiskError> {
        let sectors = bytes.min(disk.bytes()) / SECTOR as u64;
        let tags = vec![0; sectors as usize];
        let mut new = VersionedDisk {
            disk,
            tags,
            salt: 0,
            random: Random::new(seed),
        };
        new.set_salt(seed);
        for at in (0..sectors).step_by(MOST as usize) {
            new.write(at, MOST.min(sectors - at), Wait::Poll, || {})?;
        }
        Ok(new)
    }

    /// Number of sectors.
    pub fn sectors(&self) -> u64 {
        self.tags.len() as u64
    }

    /// Makes what is written from now on, and where, differ from what others write.
    pub fn set_salt(&mut self, salt: u64) {
        self.salt = mix(salt) % VERSION;
        self.random = Random::new(salt);
    }

    /// Writes some sectors; runs `between` with the request queued and the device not yet told.
    pub fn write_somewhere(&mut self, wait: Wait, between: impl FnOnce()) -> Result<(), DiskError> {
        let at = self.random.below(self.sectors());
        let count = 1 + self.random.below(MOST.min(self.sectors() - at));
        self.write(at, count, wait, between)
    }

    /// The first sector that does not hold what this VM wrote last.
    pub fn check(&self) -> Result<Option<u64>, DiskError> {
        let mut found = vec![0; MOST as usize * SECTOR];
        let mut expected = [0; SECTOR];
        for at in (0..self.sectors()).step_by(MOST as usize) {
            let found = &mut found[..MOST.min(self.sectors() - at) as usize * SECTOR];
            self.disk.read(at, found)?;
            for (content, sector) in found.chunks_exact(SECTOR).zip(at..) {
                fill(&mut expected, sector, self.tags[sector as usize]);
                if content != expected {
                    return Ok(Some(sector));
                }
            }
        }
        Ok(None)
    }

    fn write(
        &mut self,
        at: u64,
        count: u64,
        wait: Wait,
        between: impl FnOnce(),
    ) -> Result<(), DiskError> {
        let mut data = vec![0; count as usize * SECTOR];
        for (content, sector) in data.chunks_exact_mut(SECTOR).zip(at..) {
            let tag = &mut self.tags[sector as usize];
            *tag = (*tag / VERSION + 1) * VERSION + self.salt;
            fill(content, sector, *tag);
        }
        let posted = self.disk.post_write(at, &data, wait)?;
        between();
        posted.finish()
    }
}

fn fill(content: &mut [u8], sector: u64, tag: u64) {
    let base = mix(tag ^ mix(sector));
    for (word, index) in content.chunks_exact_mut(8).zip(0..) {
        word.copy_from_slice(&mix(base ^ index).to_le_bytes());
    }
}
