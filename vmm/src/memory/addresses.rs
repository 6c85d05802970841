//! Addresses of this process for guest RAM, with nothing mapped there until something is.
//!
//! A range that merely stays free cannot be had from the kernel: what it hands out is mapped, and to
//! map over that later makes KVM walk the memory slot page by page (160 µs per 512 MiB on a KVM with
//! shadow paging, 2.5 ms for 8 GiB) although there is nothing to forget. So ranges are dealt out
//! here, from a part of the address space that the kernel leaves to those who ask for it by name: far
//! below where it maps files and stacks, far above where programs lie. That nobody else has taken a
//! range meanwhile shows when it is mapped (MAP_FIXED_NOREPLACE).
#![allow(unsafe_code)] // munmap by address.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use super::MemoryError;

/// 16 to 80 TiB.
const ZONE: Range<u64> = 0x1000_0000_0000..0x5000_0000_0000;
/// Ranges begin at multiples of this, so that huge pages are possible, and have as much room after
/// them: an access beyond the end is a crash.
const ALIGN: u64 = 1 << 30;

/// Ranges that are taken, by first address, with the room after them.
static TAKEN: Mutex<Option<Taken>> = Mutex::new(None);

struct Taken {
    ranges: BTreeMap<u64, u64>,
    /// Where to look next: a range that was just freed rests for a while.
    next: u64,
}

/// A range of addresses. What its holder has mapped there goes when it is dropped.
#[derive(Debug)]
pub(super) struct Addresses {
    start: u64,
    len: u64,
    whose: OnceLock<Whose>,
}

/// Whose mapping lies in a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Whose {
    Holders,
    Strangers,
}

impl Addresses {
    /// Takes `len` bytes.
    pub(super) fn take(len: u64) -> Result<Addresses, MemoryError> {
        let mut taken = lock();
        let taken = taken.get_or_insert_with(Taken::new);
        let size = len.next_multiple_of(ALIGN) + ALIGN;
        let start = taken.find(size).ok_or(MemoryError::Addresses { len })?;
        taken.ranges.insert(start, start + size);
        taken.next = start + size;
        Ok(Addresses {
            start,
            len,
            whose: OnceLock::new(),
        })
    }

    pub(super) fn start(&self) -> *mut u8 {
        self.start as *mut u8
    }

    /// The holder has mapped all of it.
    pub(super) fn note_mapped(&self) {
        self.whose.get_or_init(|| Whose::Holders);
    }

    /// Somebody else was there first: it is left alone, and never dealt out again.
    pub(super) fn note_taken(&self) {
        self.whose.get_or_init(|| Whose::Strangers);
    }

    /// Whether the holder has mapped it.
    pub(super) fn is_mapped(&self) -> bool {
        self.whose.get() == Some(&Whose::Holders)
    }

    /// Takes back what the holder has mapped in the first `len` bytes, of a range that it could not map
    /// as a whole.
    pub(super) fn unmap_first(&self, len: u64) -> io::Result<()> {
        // SAFETY: the caller has just mapped these bytes where nothing was, and nobody has used them.
        match unsafe { libc::munmap(self.start().cast(), len as usize) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for Addresses {
    fn drop(&mut self) {
        if self.whose.get() == Some(&Whose::Strangers) {
            return;
        }
        // SAFETY: all of the range is mapped by whoever held this value, and nobody else holds it: nobody
        // has a reference into it any more.
        if self.is_mapped() && unsafe { libc::munmap(self.start().cast(), self.len as usize) } != 0
        {
            let error = io::Error::last_os_error();
            // Never dealt out again, then.
            tracing::error!(%error, "guest RAM could not be unmapped");
            return;
        }
        if let Some(taken) = lock().as_mut() {
            taken.ranges.remove(&self.start);
        }
    }
}

fn lock() -> MutexGuard<'static, Option<Taken>> {
    TAKEN.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Taken {
    /// None yet; begins somewhere else in each process, as the kernel's own choices do.
    fn new() -> Taken {
        let places = (ZONE.end - ZONE.start) / 2 / ALIGN;
        let random = RandomState::new().hash_one(std::process::id());
        Taken {
            ranges: BTreeMap::new(),
            next: ZONE.start + random % places * ALIGN,
        }
    }

    /// The first free range of `size` bytes from `next` on, or from the start of the zone.
    fn find(&self, size: u64) -> Option<u64> {
        [self.next, ZONE.start].into_iter().find_map(|mut start| {
            // A range that begins below may reach over `start`.
            let before = self.ranges.range(..start).next_back();
            start = before.map_or(start, |(_, &end)| end.max(start));
            for (&from, &end) in self.ranges.range(start..) {
                if from - start >= size {
                    break;
                }
                start = end;
            }
            (start + size <= ZONE.end).then_some(start)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(ranges: &[(u64, u64)], next: u64) -> Taken {
        let at = |gib: u64| ZONE.start + gib * ALIGN;
        Taken {
            ranges: ranges
                .iter()
                .map(|&(from, to)| (at(from), at(to)))
                .collect(),
            next: at(next),
        }
    }

    fn find(taken: &Taken, gib: u64) -> Option<u64> {
        taken
            .find(gib * ALIGN)
            .map(|start| (start - ZONE.start) / ALIGN)
    }

    #[test]
    fn a_range_is_found_behind_the_last_one_and_in_gaps() {
        assert_eq!(find(&taken(&[], 7), 2), Some(7));
        assert_eq!(find(&taken(&[(0, 2), (4, 6)], 6), 2), Some(6));
        assert_eq!(find(&taken(&[(0, 2), (4, 6)], 1), 2), Some(2));
        assert_eq!(find(&taken(&[(0, 2), (4, 6)], 1), 3), Some(6));
    }

    #[test]
    fn at_the_end_of_the_zone_it_begins_anew() {
        let all = (ZONE.end - ZONE.start) / ALIGN;
        assert_eq!(find(&taken(&[(0, 3)], all - 1), 2), Some(3));
        assert_eq!(find(&taken(&[(0, all - 1)], all - 1), 2), None);
    }

    #[test]
    fn ranges_that_are_held_never_meet() {
        let held: Vec<_> = (1..40)
            .map(|mib| Addresses::take(mib << 20).unwrap())
            .collect();
        let mut ranges: Vec<_> = held
            .iter()
            .map(|held| held.start..held.start + held.len)
            .collect();
        ranges.sort_unstable_by_key(|range| range.start);
        assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start));
    }
}
