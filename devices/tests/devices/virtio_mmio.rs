use std::sync::Arc;

use forkvm_devices::block::{BlockLayer, Overlay};
use forkvm_devices::virtio::{Blk, Rng};
use forkvm_devices::{Device, DeviceError, Effect};

use crate::driver::{
    AVAIL, DATA, DESC, Driver, EVENT_IDX, QUEUE_SIZE, RAM, USED, VERSION_1, all, copy_of, reg,
    status, writable,
};
use crate::virtio_blk::zero_disk;

fn running() -> Driver<Rng> {
    Driver::running(Rng, VERSION_1)
}

/// A device in another VM with the same memory, in the state of `old`.
fn restored(old: &Driver<Rng>) -> Driver<Rng> {
    let mut new = Driver::with_memory(Rng, copy_of(&old.memory));
    new.device.restore(&old.device.save().unwrap()).unwrap();
    new
}

#[test]
fn a_driver_finds_a_modern_device() {
    let mut driver = Driver::new(Rng);
    assert_eq!(driver.get(reg::MAGIC), u32::from_le_bytes(*b"virt"));
    assert_eq!(driver.get(reg::VERSION), 2);
    assert_eq!(driver.get(reg::DEVICE_ID), 4);
    assert_eq!(driver.get(reg::QUEUE_NUM_MAX), 64);
    driver.set(reg::QUEUE_SEL, 1);
    assert_eq!(driver.get(reg::QUEUE_NUM_MAX), 0, "there is one queue");
    assert_eq!(
        driver.offered() & (VERSION_1 | EVENT_IDX),
        VERSION_1 | EVENT_IDX
    );
}

#[test]
fn features_that_were_not_offered_are_refused() {
    for features in [VERSION_1 | 1 << 63, VERSION_1 | 1, 0, EVENT_IDX] {
        let mut driver = Driver::new(Rng);
        driver.negotiate(features);
        assert_eq!(
            driver.get(reg::STATUS),
            status::ACKNOWLEDGE | status::DRIVER
        );
        driver.add_status(status::DRIVER_OK);
        assert_eq!(driver.get(reg::STATUS) & status::DRIVER_OK, 0);
    }
}

#[test]
fn features_cannot_change_once_they_are_settled() {
    let mut driver = Driver::new(Rng);
    driver.negotiate(VERSION_1);
    driver.set(reg::DRIVER_FEATURES_SEL, 0);
    driver.set(reg::DRIVER_FEATURES, EVENT_IDX as u32);
    driver.set_up_queue();
    driver.add_status(status::DRIVER_OK);
    // Without EVENT_IDX every returned request interrupts, whatever used_event says.
    driver.put16(AVAIL + 4 + 2 * u64::from(QUEUE_SIZE), 100);
    driver.request(&[writable(DATA, 1)]);
    assert_eq!(driver.line.edges(), 1);
}

#[test]
fn a_status_bit_cannot_be_taken_back_but_zero_resets() {
    let mut driver = running();
    let before = driver.get(reg::STATUS);
    driver.set(reg::STATUS, status::ACKNOWLEDGE);
    assert_eq!(driver.get(reg::STATUS), before);
    driver.set(reg::STATUS, 0);
    assert_eq!(driver.get(reg::STATUS), 0);
    assert_eq!(driver.get(reg::QUEUE_READY), 0);
    driver.start(VERSION_1);
    assert_eq!(
        driver.request(&[writable(DATA, 8)]),
        8,
        "it works again after a reset"
    );
}

#[test]
fn a_queue_is_ready_only_when_its_rings_lie_in_ram() {
    for (register, address) in [
        (reg::QUEUE_DESC, RAM),
        (reg::QUEUE_AVAIL, RAM - 16),
        (reg::QUEUE_USED, !0xfff),
        (reg::QUEUE_AVAIL, 0),
    ] {
        let mut driver = Driver::new(Rng);
        driver.negotiate(VERSION_1);
        driver.set_up_queue();
        assert_eq!(driver.get(reg::QUEUE_READY), 1);
        driver.set(reg::QUEUE_READY, 0);
        for (ring, place) in [
            (reg::QUEUE_DESC, DESC),
            (reg::QUEUE_AVAIL, AVAIL),
            (reg::QUEUE_USED, USED),
            (register, address),
        ] {
            driver.set(ring, place as u32);
            driver.set(ring + 4, (place >> 32) as u32);
        }
        driver.set(reg::QUEUE_READY, 1);
        assert_eq!(
            driver.get(reg::QUEUE_READY),
            0,
            "{register:#x} at {address:#x}"
        );
    }
}

#[test]
fn a_queue_cannot_be_set_up_before_the_features_are_settled() {
    let mut driver = Driver::new(Rng);
    driver.set_up_queue();
    assert_eq!(driver.get(reg::QUEUE_READY), 0);
}

#[test]
fn a_ready_queue_does_not_move() {
    let mut driver = running();
    driver.set(reg::QUEUE_DESC, 0);
    driver.set(reg::QUEUE_NUM, 2);
    assert_eq!(driver.request(&[writable(DATA, 8)]), 8);
}

#[test]
fn nothing_is_served_before_the_driver_is_ready() {
    let mut driver = Driver::new(Rng);
    driver.negotiate(VERSION_1);
    driver.set_up_queue();
    driver.offer_chain(&[writable(DATA, 8)]);
    driver.notify();
    assert_eq!((driver.used(), driver.line.edges()), (0, 0));
}

#[test]
fn a_returned_request_interrupts_until_it_is_acknowledged() {
    let mut driver = running();
    driver.request(&[writable(DATA, 8)]);
    assert_eq!(
        (driver.get(reg::INTERRUPT_STATUS), driver.line.edges()),
        (1, 1)
    );
    driver.set(reg::INTERRUPT_ACK, 1);
    assert_eq!(driver.get(reg::INTERRUPT_STATUS), 0);
}

#[test]
fn a_driver_that_polls_is_not_interrupted() {
    let mut driver = running();
    driver.put16(AVAIL, 1);
    driver.request(&[writable(DATA, 8)]);
    assert_eq!(
        (driver.get(reg::INTERRUPT_STATUS), driver.line.edges()),
        (0, 0)
    );
}

#[test]
fn with_event_idx_the_driver_says_after_which_request_it_wants_an_interrupt() {
    let mut driver = Driver::running(Rng, VERSION_1 | EVENT_IDX);
    driver.put16(AVAIL + 4 + 2 * u64::from(QUEUE_SIZE), 2);
    let mut edges = Vec::new();
    for _ in 0..4 {
        driver.request(&[writable(DATA, 1)]);
        edges.push(driver.line.edges());
    }
    assert_eq!(edges, [0, 0, 1, 1]);
}

#[test]
fn a_broken_queue_asks_for_a_reset_and_works_after_it() {
    type Breakage = fn(&mut Driver<Rng>);
    let breakages: [Breakage; 2] = [
        |driver| driver.put16(AVAIL + 2, 1000),
        |driver| driver.offer(QUEUE_SIZE),
    ];
    for breakage in breakages {
        let mut driver = running();
        breakage(&mut driver);
        driver.notify();
        assert_ne!(driver.get(reg::STATUS) & status::NEEDS_RESET, 0);
        assert_eq!(
            driver.get(reg::INTERRUPT_STATUS),
            2,
            "a configuration change"
        );
        assert_eq!(driver.line.edges(), 1);
        driver.notify();
        assert_eq!(driver.line.edges(), 1, "it stands still until it is reset");
        driver.start(VERSION_1);
        assert_eq!(driver.request(&[writable(DATA, 8)]), 8);
    }
}

#[test]
fn an_interrupt_on_its_way_and_a_request_that_was_not_announced_survive_a_restore() {
    let mut old = running();
    old.request(&[writable(DATA, 8)]);
    old.offer_chain(&[writable(DATA + 8, 8)]);
    let mut new = restored(&old);
    assert_eq!(
        (new.line.edges(), new.used()),
        (0, 1),
        "nothing happens before activate"
    );
    new.device.activate().unwrap();
    assert_eq!(new.get(reg::INTERRUPT_STATUS), 1);
    assert!(new.line.edges() >= 1);
    assert_eq!(new.used(), 2);
    assert_eq!(old.used(), 1, "the old VM is left alone");
}

#[test]
fn activating_an_idle_device_writes_no_guest_memory() {
    let mut old = Driver::running(Rng, VERSION_1 | EVENT_IDX);
    old.request(&[writable(DATA, 8)]);
    old.set(reg::INTERRUPT_ACK, 1);
    let mut new = restored(&old);
    // A value that the device would never write, where it would write first: the avail event.
    new.put16(USED + 4 + 8 * u64::from(QUEUE_SIZE), 0x7777);
    let before = all(&new.memory);
    new.device.activate().unwrap();
    assert!(all(&new.memory) == before);
    assert_eq!(new.line.edges(), 0);
}

#[test]
fn a_restored_queue_goes_on_where_it_stood() {
    let mut old = Driver::running(Rng, VERSION_1 | EVENT_IDX);
    for _ in 0..QUEUE_SIZE + 3 {
        old.request(&[writable(DATA, 8)]);
    }
    let mut new = restored(&old);
    new.device.activate().unwrap();
    let used = new.used();
    new.write_table(DESC, &[writable(DATA, 5)]);
    // The driver's own state went with guest memory.
    new.put16(AVAIL + 4 + 2 * u64::from(used % QUEUE_SIZE), 0);
    new.put16(AVAIL + 2, used + 1);
    new.notify();
    assert_eq!(new.used(), used + 1);
}

#[test]
fn a_state_that_does_not_fit_is_refused_and_changes_nothing() {
    let base: Arc<dyn BlockLayer> = zero_disk();
    let mut blk = Driver::new(Blk::new(Arc::new(Overlay::in_memory(base)), "disk"));
    let before = blk.device.save().unwrap();
    let error = blk
        .device
        .restore(&running().device.save().unwrap())
        .unwrap_err();
    assert!(
        matches!(
            error,
            DeviceError::Section(_) | DeviceError::Inconsistent { .. }
        ),
        "{error}"
    );
    assert_eq!(blk.device.save().unwrap(), before);
}

#[test]
fn a_state_with_rings_outside_of_ram_is_refused() {
    let small = vm_memory::GuestMemoryMmap::from_ranges(&[(vm_memory::GuestAddress(0), 4096)]);
    let mut new = Driver::with_memory(Rng, small.unwrap());
    let error = new
        .device
        .restore(&running().device.save().unwrap())
        .unwrap_err();
    assert!(
        error.to_string().contains("queue 0 lies outside of RAM"),
        "{error}"
    );
}

#[test]
fn registers_take_32_bits_only() {
    let mut driver = Driver::new(Rng);
    for len in [1, 2, 8] {
        let mut data = vec![0xaa; len];
        driver.device.read(reg::MAGIC, &mut data);
        assert_eq!(data, vec![0; len]);
        assert_eq!(
            driver.device.write(reg::STATUS, &vec![1; len]),
            Effect::None
        );
        assert_eq!(driver.get(reg::STATUS), 0);
    }
}
