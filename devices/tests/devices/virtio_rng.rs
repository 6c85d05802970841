use forkvm_devices::virtio::Rng;

use crate::driver::{DATA, Driver, VERSION_1, readable, writable};

#[test]
fn buffers_are_filled_with_random_bytes() {
    let mut driver = Driver::running(Rng, VERSION_1);
    let len = driver.request(&[writable(DATA, 40), writable(DATA + 100, 24)]);
    assert_eq!(len, 64);
    let (one, other) = (driver.bytes(DATA, 40), driver.bytes(DATA + 100, 24));
    assert!(one.iter().any(|&byte| byte != 0) && other.iter().any(|&byte| byte != 0));
    assert_ne!(one[..24], other);
    assert_eq!(
        driver.bytes(DATA + 40, 60),
        [0; 60],
        "nothing beside the buffers is written"
    );
}

#[test]
fn a_request_gets_64_kib_at_most() {
    let mut driver = Driver::running(Rng, VERSION_1);
    assert_eq!(driver.request(&[writable(DATA, 0x2_0000)]), 0x1_0000);
}

#[test]
fn a_request_without_room_or_outside_of_ram_comes_back_empty() {
    let mut driver = Driver::running(Rng, VERSION_1);
    assert_eq!(driver.request(&[readable(DATA, 16)]), 0);
    assert_eq!(driver.request(&[writable(u64::MAX - 8, 16)]), 0);
}
