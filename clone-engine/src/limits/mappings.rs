//! Mappings that this process can still make (vm.max_map_count).
//!
//! The kernel tells their number only by listing them all, which takes 5 ms in a process with a
//! thousand VMs. So they are counted rarely: what was promised to clones since the last count is taken
//! as used, and half of what was left then is for others. Only when both are spent it counts again.

use std::fs;
use std::io::{self, Read};
use std::sync::{Mutex, PoisonError};

use super::host;

/// Mappings left free for the rest of the process: the allocator, libraries, other threads.
const RESERVE: u64 = 512;

/// What a process may map where the kernel does not say.
const DEFAULT_MOST: u64 = 65_530;

/// `None` until they are counted for the first time.
static ACCOUNT: Mutex<Option<Account>> = Mutex::new(None);

/// What is known of them.
struct Account {
    /// When they were counted.
    left: u64,
    /// To clones since; those that have ended by now included.
    promised: u64,
}

impl Account {
    /// Those left now, if that is known well enough to promise `wanted` more.
    fn left(&self, wanted: u64) -> Option<u64> {
        let enough = self.promised.saturating_add(wanted) <= self.left / 2;
        enough.then(|| self.left - self.promised)
    }
}

/// How many clones can have; counted again where `wanted` more could come close to the limit.
pub(super) fn left(wanted: u64) -> io::Result<u64> {
    let mut account = ACCOUNT.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(left) = account.as_ref().and_then(|known| known.left(wanted)) {
        return Ok(left);
    }
    let left = most().saturating_sub(count()? + RESERVE);
    *account = Some(Account { left, promised: 0 });
    Ok(left)
}

/// Clones that were granted will make `count` of them.
pub(crate) fn promise(count: u64) {
    let mut account = ACCOUNT.lock().unwrap_or_else(PoisonError::into_inner);
    // Who has not counted yet will count these.
    if let Some(account) = &mut *account {
        account.promised = account.promised.saturating_add(count);
    }
}

/// How many more each of `clones` may have, which are granted already: half of what is left.
pub(crate) fn spare(clones: u32) -> io::Result<u64> {
    Ok(left(0)? / 2 / u64::from(clones.max(1)))
}

/// The limit of a process.
fn most() -> u64 {
    host::number("/proc/sys/vm/max_map_count").unwrap_or(DEFAULT_MOST)
}

/// The lines of /proc/self/maps.
fn count() -> io::Result<u64> {
    let mut maps = fs::File::open("/proc/self/maps")?;
    let mut part = vec![0; 64 * 1024];
    let mut lines = 0;
    loop {
        match maps.read(&mut part)? {
            0 => return Ok(lines),
            read => lines += part[..read].iter().filter(|byte| **byte == b'\n').count() as u64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account(left: u64, promised: u64) -> Account {
        Account { left, promised }
    }

    #[test]
    fn half_of_what_was_left_is_promised_without_counting_again() {
        assert_eq!(account(1000, 0).left(500), Some(1000));
        assert_eq!(account(1000, 400).left(100), Some(600));
        assert_eq!(account(1000, 400).left(101), None);
        assert_eq!(account(0, 0).left(1), None);
    }

    #[test]
    fn every_mapping_counts() {
        let lines = fs::read_to_string("/proc/self/maps").unwrap();
        let lines = lines.lines().count() as u64;
        let counted = count().unwrap();
        assert!(counted.abs_diff(lines) < 40, "{counted}, {lines} listed");
    }
}
