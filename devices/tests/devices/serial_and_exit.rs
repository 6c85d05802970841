use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use forkvm_devices::{Device, Effect, ExitDevice, Serial};

use crate::driver::{Line, write32};

/// A console whose output the test can see.
#[derive(Clone, Default)]
pub(crate) struct Screen(pub(crate) Arc<Mutex<Vec<u8>>>);

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Broken;

impl Write for Broken {
    fn write(&mut self, _bytes: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::BrokenPipe.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Err(io::ErrorKind::BrokenPipe.into())
    }
}

fn serial() -> (Serial, Arc<Line>, Screen) {
    let (line, screen) = (Arc::new(Line::default()), Screen::default());
    (
        Serial::new(line.clone(), Box::new(screen.clone())),
        line,
        screen,
    )
}

fn read8(device: &mut dyn Device, register: u64) -> u8 {
    let mut data = [0xaa];
    device.read(register, &mut data);
    data[0]
}

#[test]
fn what_the_guest_transmits_appears_on_the_console() {
    let (mut serial, _, screen) = serial();
    assert_eq!(serial.write(0, b"H"), Effect::None);
    assert_eq!(serial.write(0, b"ello"), Effect::None);
    assert_eq!(*screen.0.lock().unwrap(), b"Hello");
}

#[test]
fn a_console_that_fails_does_not_hurt_the_guest() {
    let line = Arc::new(Line::default());
    let mut serial = Serial::new(line.clone(), Box::new(Broken));
    assert_eq!(serial.write(1, &[2]), Effect::None);
    let before = line.edges();
    assert_eq!(read8(&mut serial, 2) & 0xf, 2, "the transmitter is empty");
    assert_eq!(serial.write(0, b"x"), Effect::None);
    assert_eq!(
        line.edges(),
        before + 1,
        "the guest is told to go on transmitting"
    );
}

#[test]
fn input_interrupts_the_guest_and_is_read_in_order() {
    let (mut serial, line, _) = serial();
    assert_eq!(serial.write(1, &[1]), Effect::None);
    assert_eq!(serial.enqueue(b"ab"), 2);
    assert_eq!(line.edges(), 1);
    assert_eq!([read8(&mut serial, 0), read8(&mut serial, 0)], *b"ab");
    assert_eq!(read8(&mut serial, 5) & 1, 0, "nothing is left");
}

#[test]
fn input_beyond_the_fifo_is_left_to_the_caller() {
    let (mut serial, _, _) = serial();
    assert_eq!(serial.enqueue(&[7; 100]), 64);
    assert_eq!(serial.enqueue(&[7; 100]), 0);
    assert_eq!(read8(&mut serial, 0), 7);
    assert_eq!(serial.enqueue(&[8; 100]), 1);
}

#[test]
fn unread_input_and_its_interrupt_survive_a_restore() {
    let (mut old, _, _) = serial();
    assert_eq!(old.write(1, &[1]), Effect::None);
    assert_eq!(old.enqueue(b"ab"), 2);
    let section = old.save().unwrap();

    let (mut new, line, screen) = serial();
    new.restore(&section).unwrap();
    assert_eq!(
        line.edges(),
        0,
        "no interrupt before all devices are restored"
    );
    new.activate().unwrap();
    assert_eq!(line.edges(), 1);
    assert_eq!([read8(&mut new, 0), read8(&mut new, 0)], *b"ab");
    assert_eq!(new.write(0, b"!"), Effect::None);
    assert_eq!(*screen.0.lock().unwrap(), b"!");
}

#[test]
fn a_32_bit_write_ends_the_machine_with_its_value() {
    assert_eq!(
        write32(&mut ExitDevice, 0, 0x1234_5678),
        Effect::Exit(0x1234_5678)
    );
}

#[test]
fn other_accesses_to_the_exit_device_are_ignored() {
    for (offset, data) in [(0, &[1u8][..]), (0, &[1, 0]), (2, &[1, 0]), (0, &[1; 8])] {
        assert_eq!(ExitDevice.write(offset, data), Effect::None);
    }
}
