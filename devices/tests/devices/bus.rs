use std::sync::{Arc, Mutex};

use forkvm_devices::bus::BusError;
use forkvm_devices::{Brake, Bus, Effect, ExitDevice, Serial};

use crate::driver::Line;
use crate::serial_and_exit::Screen;

fn bus_with_exit_at(start: u64) -> Bus {
    let mut bus = Bus::new(Brake::default());
    bus.insert(start, 4, Arc::new(Mutex::new(ExitDevice)))
        .unwrap();
    bus
}

#[test]
fn an_access_reaches_the_device_that_decodes_it() {
    assert_eq!(
        bus_with_exit_at(0xf4).write(0xf4, &7u32.to_le_bytes()),
        Effect::Exit(7)
    );
}

#[test]
fn an_address_without_a_device_reads_as_all_ones_and_swallows_writes() {
    let bus = bus_with_exit_at(0xf4);
    for (address, len) in [(0xf3, 1), (0xf3, 4), (0xf8, 1), (0xf6, 4), (u64::MAX, 1)] {
        let mut data = vec![0; len];
        bus.read(address, &mut data);
        assert!(data.iter().all(|&byte| byte == 0xff), "{address:#x}");
        assert_eq!(bus.write(address, &data), Effect::None);
    }
}

#[test]
fn a_repeated_port_access_reaches_the_device_as_a_whole() {
    let screen = Screen::default();
    let serial = Serial::new(Arc::new(Line::default()), Box::new(screen.clone()));
    let mut bus = Bus::new(Brake::default());
    bus.insert(0x3f8, 8, Arc::new(Mutex::new(serial))).unwrap();
    let text = b"longer than the eight ports of a UART";
    assert_eq!(bus.write_repeated(0x3f8, 1, text), Effect::None);
    assert_eq!(*screen.0.lock().unwrap(), text);
    let mut data = [0; 20];
    bus.read_repeated(0x3fd, 1, &mut data);
    assert_eq!(data, [0x60; 20], "the line status, each time");
}

#[test]
fn a_repeated_access_that_starts_outside_or_whose_width_crosses_the_end_is_not_decoded() {
    let bus = bus_with_exit_at(0xf4);
    for (address, width) in [(0xf3, 1), (0xf5, 4), (0xf8, 1)] {
        let mut data = [0; 8];
        bus.read_repeated(address, width, &mut data);
        assert_eq!(data, [0xff; 8], "{address:#x}");
    }
}

#[test]
fn two_devices_cannot_share_an_address() {
    let mut bus = bus_with_exit_at(0x100);
    for start in [0xfd, 0x100, 0x103] {
        let clash = bus.insert(start, 4, Arc::new(Mutex::new(ExitDevice)));
        assert_eq!(
            clash,
            Err(BusError::Overlap {
                start,
                len: 4,
                at: 0x100,
                taken: 4
            })
        );
    }
    bus.insert(0x104, 4, Arc::new(Mutex::new(ExitDevice)))
        .unwrap();
    bus.insert(0xfc, 4, Arc::new(Mutex::new(ExitDevice)))
        .unwrap();
}

#[test]
fn an_empty_or_wrapping_range_is_refused() {
    let mut bus = Bus::new(Brake::default());
    for (start, len) in [(5, 0), (u64::MAX, 2)] {
        let refused = bus.insert(start, len, Arc::new(Mutex::new(ExitDevice)));
        assert_eq!(refused, Err(BusError::Range { start, len }));
    }
}

#[test]
fn in_a_condemned_machine_no_access_reaches_a_device() {
    // Its vCPU may be about to write what it has read from a page that never was.
    let brake = Brake::default();
    let mut bus = Bus::new(brake.clone());
    bus.insert(0xf4, 4, Arc::new(Mutex::new(ExitDevice)))
        .unwrap();
    assert_eq!(bus.write(0xf4, &3u32.to_le_bytes()), Effect::Exit(3));
    brake.condemn();
    assert_eq!(bus.write(0xf4, &3u32.to_le_bytes()), Effect::None);
    let mut data = [0; 4];
    bus.read(0xf4, &mut data);
    assert_eq!(data, [0xff; 4]);
}
