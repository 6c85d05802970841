//! What every device promises, held against each of them.

use std::sync::Arc;

use forkvm_devices::block::SECTOR;
use forkvm_devices::device::GuestCall;
use forkvm_devices::virtio::vsock::{Cid, UnixBackend};
use forkvm_devices::virtio::{Blk, Console, MmioTransport, Rng, Vsock};
use forkvm_devices::{
    Brake, Device, DeviceError, Doorbell, Effect, ExitDevice, SectionError, Serial,
};

use crate::driver::{Driver, Line, VERSION_1, ram, write32};
use crate::virtio_blk::writable_disk;
use crate::{virtio_console, vsock_guest};

/// A kind of device: how one is built, and how a guest brings it into a state worth saving.
struct Kind {
    name: &'static str,
    range: u64,
    build: fn() -> Box<dyn Device>,
    used: fn() -> Box<dyn Device>,
}

fn disk() -> Blk {
    Blk::new(writable_disk(), "disk")
}

fn doorbell() -> Doorbell {
    Doorbell::new(ram(), Arc::new(Line::default()), 2, 0xf)
}

fn serial() -> Serial {
    Serial::new(Arc::new(Line::default()), Box::new(std::io::sink()))
}

fn vsock() -> Vsock<UnixBackend> {
    Vsock::new(Cid::new(3).unwrap(), None)
}

fn used_virtio<D: forkvm_devices::virtio::VirtioDevice + 'static>(model: D) -> Box<dyn Device> {
    let mut driver = Driver::running(model, VERSION_1);
    driver.request(&[crate::driver::writable(crate::driver::DATA, 64)]);
    Box::new(driver.device)
}

fn fresh_virtio<D: forkvm_devices::virtio::VirtioDevice + 'static>(model: D) -> Box<dyn Device> {
    Box::new(MmioTransport::new(
        "dut".into(),
        model,
        ram(),
        Arc::new(Line::default()),
        Brake::default(),
    ))
}

const KINDS: [Kind; 7] = [
    Kind {
        name: "serial",
        range: 8,
        build: || Box::new(serial()),
        used: || {
            let mut serial = serial();
            serial.enqueue(b"unread");
            for (register, value) in [(1, 1), (3, 0x83), (0, 3), (4, 0xb), (7, 0x42)] {
                assert_eq!(serial.write(register, &[value]), Effect::None);
            }
            Box::new(serial)
        },
    },
    Kind {
        name: "exit",
        range: 4,
        build: || Box::new(ExitDevice),
        used: || Box::new(ExitDevice),
    },
    Kind {
        name: "doorbell",
        range: 0x20,
        build: || Box::new(doorbell()),
        used: || {
            let mut bell = doorbell();
            assert_eq!(write32(&mut bell, 0x10, 3), Effect::None);
            let identity = forkvm_devices::doorbell::Announcement {
                fork_count: 3,
                clone_id: 2,
                depth: 1,
                generation: [9; 16],
            };
            bell.announce(&identity).unwrap();
            Box::new(bell)
        },
    },
    Kind {
        name: "dut",
        range: 0x1000,
        build: || fresh_virtio(disk()),
        used: || used_virtio(disk()),
    },
    Kind {
        name: "dut",
        range: 0x1000,
        build: || fresh_virtio(Rng),
        used: || used_virtio(Rng),
    },
    Kind {
        name: "dut",
        range: 0x1000,
        build: || fresh_virtio(Console::new(Box::new(std::io::sink()))),
        used: || {
            let mut guest = virtio_console::Guest::new(std::io::sink());
            guest.device.enqueue(b"unread");
            Box::new(guest.device)
        },
    },
    Kind {
        name: "dut",
        range: 0x1000,
        build: || fresh_virtio(vsock()),
        used: || {
            let mut guest = vsock_guest::Guest::new(None, 4096);
            let request = vsock_guest::Header::new(vsock_guest::op::REQUEST, 1, 2);
            guest.send(request, &[]);
            let device = Arc::into_inner(guest.device).unwrap();
            Box::new(device.into_inner().unwrap())
        },
    },
];

#[test]
fn a_restored_device_saves_what_it_was_restored_from() {
    for kind in KINDS {
        let saved = (kind.used)().save().unwrap();
        let mut fresh = (kind.build)();
        fresh.restore(&saved).unwrap();
        assert_eq!(fresh.save().unwrap(), saved, "{}", kind.name);
    }
}

#[test]
fn a_device_is_saved_under_its_own_name() {
    for kind in KINDS {
        let device = (kind.build)();
        assert_eq!(device.name(), kind.name);
        assert_eq!(device.save().unwrap().kind, format!("dev/{}", kind.name));
    }
}

#[test]
fn saving_changes_nothing() {
    for kind in KINDS {
        let device = (kind.used)();
        assert_eq!(device.save().unwrap(), device.save().unwrap());
    }
}

#[test]
fn a_section_of_another_version_is_refused_by_name_and_changes_nothing() {
    for kind in KINDS {
        for version in [0, 999] {
            let mut section = (kind.used)().save().unwrap();
            section.version = version;
            let mut fresh = (kind.build)();
            let before = fresh.save().unwrap();
            let error = fresh.restore(&section).unwrap_err();
            assert!(
                matches!(&error, DeviceError::Section(SectionError::Version { found, .. })
                    if *found == version),
                "{}: {error}",
                kind.name
            );
            assert!(error.to_string().contains(&section.kind));
            assert_eq!(fresh.save().unwrap(), before);
        }
    }
}

#[test]
fn a_damaged_section_is_an_error_or_a_state_but_never_a_panic() {
    for kind in KINDS {
        let section = (kind.used)().save().unwrap();
        for at in 0..section.body.len() {
            for flip in [0x01, 0x80, 0xff] {
                let mut damaged = section.clone();
                damaged.body[at] ^= flip;
                let mut fresh = (kind.build)();
                let before = fresh.save().unwrap();
                if fresh.restore(&damaged).is_err() {
                    assert_eq!(fresh.save().unwrap(), before, "{}: byte {at}", kind.name);
                }
            }
            let mut short = section.clone();
            short.body.truncate(at);
            assert!(
                (kind.build)().restore(&short).is_err(),
                "{}: cut at {at}",
                kind.name
            );
        }
    }
}

#[test]
fn rubbish_of_every_width_at_every_offset_does_no_harm() {
    for kind in KINDS {
        let mut device = (kind.used)();
        for value in [0, 0xff, 0x5a] {
            for width in [1, 2, 4, 8] {
                for offset in 0..(kind.range + 1).saturating_sub(width) {
                    let mut data = vec![value; width as usize];
                    match device.write(offset, &data) {
                        Effect::Call(GuestCall { slot, .. }) => assert!(slot < 32),
                        Effect::None | Effect::Exit(_) | Effect::Report(_) => {}
                    }
                    device.read(offset, &mut data);
                }
            }
        }
        let saved = device.save().unwrap();
        (kind.build)().restore(&saved).unwrap();
        device.activate().unwrap();
    }
}

#[test]
fn a_disk_keeps_its_layer_through_a_restore() {
    let layer = writable_disk();
    layer.write_at(0, &[3; SECTOR as usize]).unwrap();
    let mut device = MmioTransport::new(
        "dut".into(),
        Blk::new(layer.clone(), ""),
        ram(),
        Arc::new(Line::default()),
        Brake::default(),
    );
    device
        .restore(&used_virtio(disk()).save().unwrap())
        .unwrap();
    assert!(Arc::ptr_eq(device.model().layer(), &layer));
}
