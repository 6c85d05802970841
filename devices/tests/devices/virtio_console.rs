//! The console device: bytes out to a writer, bytes in from whoever pushes them.

use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use forkvm_devices::virtio::{Console, MmioTransport};
use forkvm_devices::{Brake, Device, GuestMemory};
use vm_memory::{Bytes, GuestAddress};

use crate::driver::{DATA, Line, VERSION_1, copy_of, ram, readable, reg, status, writable};
use crate::driver::{read32, write32};
use crate::ring::{self, Ring};

/// A writer whose bytes the test sees.
#[derive(Clone, Default)]
struct Shared(Arc<Mutex<Vec<u8>>>);

impl Write for Shared {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A writer that is no good.
struct Broken;

impl Write for Broken {
    fn write(&mut self, _data: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::StorageFull.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

pub(crate) struct Guest {
    pub(crate) device: MmioTransport<Console>,
    memory: GuestMemory,
    brake: Brake,
    line: Arc<Line>,
    receive: Ring,
    transmit: Ring,
}

impl Guest {
    pub(crate) fn new(out: impl Write + Send + 'static) -> Guest {
        let (memory, line, brake) = (ram(), Arc::new(Line::default()), Brake::default());
        let mut device = device(&memory, &line, &brake, out);
        let mut rings = ring::start(&mut device, &memory, VERSION_1, 2).into_iter();
        Guest {
            device,
            memory,
            brake,
            line,
            receive: rings.next().unwrap(),
            transmit: rings.next().unwrap(),
        }
    }

    fn send(&mut self, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(DATA)).unwrap();
        let (half, len) = (bytes.len() as u32 / 2, bytes.len() as u32);
        let chain = [
            readable(DATA, half),
            readable(DATA + u64::from(half), len - half),
        ];
        self.transmit.offer(&self.memory, 0, &chain);
        self.transmit.notify(&mut self.device);
        assert_eq!(self.transmit.take(&self.memory), Some((0, 0)));
    }

    fn give_buffer(&mut self, len: u32) {
        self.receive.offer(&self.memory, 0, &[writable(DATA, len)]);
        self.receive.notify(&mut self.device);
    }

    fn received(&mut self) -> Option<Vec<u8>> {
        let (_, len) = self.receive.take(&self.memory)?;
        let mut bytes = vec![0; len as usize];
        self.memory
            .read_slice(&mut bytes, GuestAddress(DATA))
            .unwrap();
        Some(bytes)
    }
}

fn device(
    memory: &GuestMemory,
    line: &Arc<Line>,
    brake: &Brake,
    out: impl Write + Send + 'static,
) -> MmioTransport<Console> {
    MmioTransport::new(
        "dut".into(),
        Console::new(Box::new(out)),
        memory.clone(),
        line.clone(),
        brake.clone(),
    )
}

#[test]
fn what_the_guest_transmits_is_written_in_order() {
    let out = Shared::default();
    let mut guest = Guest::new(out.clone());
    let long: Vec<u8> = (0..10_000u32).map(|at| at as u8).collect();
    guest.send(b"hello, ");
    guest.send(&long);
    assert_eq!(out.0.lock().unwrap()[..7], *b"hello, ");
    assert!(out.0.lock().unwrap()[7..] == long);
}

#[test]
fn a_writer_that_fails_is_not_the_guests_concern() {
    let mut guest = Guest::new(Broken);
    guest.send(b"one");
    guest.send(b"two");
}

#[test]
fn input_waits_for_buffers_and_its_pusher_hears_how_much_fits() {
    let mut guest = Guest::new(io::sink());
    assert_eq!(guest.device.enqueue(&[1; 4000]), 4000);
    assert_eq!(guest.device.enqueue(&[2; 4000]), 96);
    assert_eq!(guest.device.enqueue(&[3]), 0);
    assert_eq!(guest.received(), None);
    guest.give_buffer(3000);
    assert_eq!(guest.received(), Some(vec![1; 3000]));
    guest.give_buffer(3000);
    let rest = guest.received().unwrap();
    assert_eq!(rest, [vec![1; 1000], vec![2; 96]].concat());
    guest.give_buffer(10);
    assert_eq!(guest.received(), None, "an empty buffer waits");
    let edges = guest.line.edges();
    assert_eq!(guest.device.enqueue(b"x"), 1);
    assert_eq!(guest.received(), Some(b"x".to_vec()));
    assert_eq!(guest.line.edges(), edges + 1);
}

#[test]
fn input_that_the_guest_has_not_had_goes_with_its_state() {
    let mut old = Guest::new(io::sink());
    old.device.enqueue(b"typed ahead");
    let (line, brake) = (Arc::new(Line::default()), Brake::default());
    let memory = copy_of(&old.memory);
    let mut new = Guest {
        device: device(&memory, &line, &brake, io::sink()),
        receive: old.receive.copy(),
        transmit: old.transmit.copy(),
        memory,
        brake,
        line,
    };
    new.device.restore(&old.device.save().unwrap()).unwrap();
    new.device.activate().unwrap();
    new.give_buffer(100);
    assert_eq!(new.received(), Some(b"typed ahead".to_vec()));
    old.give_buffer(5);
    assert_eq!(old.received(), Some(b"typed".to_vec()));
}

#[test]
fn input_in_a_pause_waits_until_the_machine_runs_again() {
    let mut guest = Guest::new(io::sink());
    guest.give_buffer(100);
    guest.brake.pull();
    assert_eq!(guest.device.enqueue(b"now?"), 4);
    assert_eq!(guest.received(), None);
    guest.brake.release();
    assert!(guest.brake.take_left_over());
    guest.device.activate().unwrap();
    assert_eq!(guest.received(), Some(b"now?".to_vec()));
}

#[test]
fn buffers_of_the_wrong_kind_do_no_harm() {
    let mut guest = Guest::new(io::sink());
    guest.device.enqueue(b"input");
    for bad in [readable(DATA, 10), writable(u64::MAX - 5, 10)] {
        guest.receive.offer(&guest.memory, 0, &[bad]);
        guest.receive.notify(&mut guest.device);
        assert_eq!(guest.receive.take(&guest.memory), Some((0, 0)));
    }
    guest.transmit.offer(&guest.memory, 0, &[writable(DATA, 9)]);
    guest.transmit.notify(&mut guest.device);
    assert_eq!(guest.transmit.take(&guest.memory), Some((0, 0)));
    guest.give_buffer(9);
    assert_eq!(guest.received(), Some(b"input".to_vec()), "none was lost");
    let state = read32(&mut guest.device, reg::STATUS);
    assert_eq!(state & status::NEEDS_RESET, 0);
}

#[test]
fn a_driver_finds_a_console_of_bytes_only() {
    let mut device = device(
        &ram(),
        &Arc::new(Line::default()),
        &Brake::default(),
        io::sink(),
    );
    assert_eq!(read32(&mut device, reg::DEVICE_ID), 3);
    for (sel, size) in [(0, 64), (1, 64), (2, 0)] {
        assert_eq!(
            write32(&mut device, reg::QUEUE_SEL, sel),
            forkvm_devices::Effect::None
        );
        assert_eq!(read32(&mut device, reg::QUEUE_NUM_MAX), size);
    }
    assert_eq!(read32(&mut device, 0x100), 0);
}
