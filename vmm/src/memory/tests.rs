#![allow(unsafe_code)] // A stranger's mapping.

use super::*;

const PAGE_LEN: usize = PAGE as usize;

/// Maps a page of ones over the start of what `ram` has reserved.
fn map_as_a_stranger(ram: &Ram) -> *mut u8 {
    let (_, address) = ram.host_ranges().next().unwrap();
    // SAFETY: nothing is mapped there; the call fails otherwise.
    let mapped = unsafe {
        libc::mmap(
            address.cast(),
            PAGE_LEN,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
            -1,
            0,
        )
    };
    assert_eq!(mapped.cast(), address);
    // SAFETY: the page was just mapped writable.
    unsafe { address.write_bytes(1, PAGE_LEN) };
    address
}

fn expect_there(address: *mut u8) {
    for byte in 0..PAGE_LEN {
        // SAFETY: the page is mapped, or the test is right to crash.
        assert_eq!(unsafe { address.add(byte).read_volatile() }, 1);
    }
}

#[test]
fn what_a_stranger_maps_into_reserved_addresses_is_left_alone() {
    let layout = MemoryLayout::new(64).unwrap();
    let mut ram = Ram::reserve(layout.clone()).unwrap();
    let stranger = map_as_a_stranger(&ram);
    let file = Arc::new(memfd(c"test", layout.len()).unwrap());
    let refused = ram.remap(Backing::Shared(file)).unwrap_err();
    assert!(matches!(refused, MemoryError::Taken { .. }), "{refused}");
    expect_there(stranger);
    ram.close().unwrap();
    drop(ram);
    expect_there(stranger);

    let ram = Ram::reserve(layout).unwrap();
    let stranger = map_as_a_stranger(&ram);
    drop(ram);
    expect_there(stranger);
}
