//! Mappings by the thousand: a process that has next to none left.
#![allow(unsafe_code)] // mmap and mprotect on a range of the test's own.

use std::fs;
use std::io;
use std::ptr;

/// Leaves this process no more than `left` of the mappings that it may have.
pub fn leave_mappings(left: usize) {
    let most = fs::read_to_string("/proc/sys/vm/max_map_count").unwrap();
    let most: usize = most.trim().parse().unwrap();
    // No two neighbours with the same access: each is a mapping.
    let wanted = most - left - mapping_count();
    let page = 4096;
    let start = map_nothing(wanted * page);
    for index in (0..wanted).step_by(2) {
        make_readable(start, index * page, page);
    }
    assert!(mapping_count() > most - left - 100, "{}", mapping_count());
}

/// An inaccessible range, never unmapped.
fn map_nothing(len: usize) -> *mut u8 {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a fresh mapping at an address of the kernel's choice.
    let start = unsafe { libc::mmap(ptr::null_mut(), len, libc::PROT_NONE, flags, -1, 0) };
    assert!(start != libc::MAP_FAILED, "{}", io::Error::last_os_error());
    start.cast()
}

/// Makes a part of it readable.
fn make_readable(start: *mut u8, offset: usize, len: usize) {
    let part = start.wrapping_add(offset);
    // SAFETY: a part of a mapping of the test's own that nobody has a reference into.
    let done = unsafe { libc::mprotect(part.cast(), len, libc::PROT_READ) };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
}

/// Mappings of this process.
fn mapping_count() -> usize {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().count()
}
