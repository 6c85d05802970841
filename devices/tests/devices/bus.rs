use std::sync::{Arc, Mutex};

use forkvm_devices::bus::BusError;
use forkvm_devices::{Bus, Effect, ExitDevice};

fn bus_with_exit_at(start: u64) -> Bus {
    let mut bus = Bus::default();
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
    let mut bus = Bus::default();
    for (start, len) in [(5, 0), (u64::MAX, 2)] {
        let refused = bus.insert(start, len, Arc::new(Mutex::new(ExitDevice)));
        assert_eq!(refused, Err(BusError::Range { start, len }));
    }
}
