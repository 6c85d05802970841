//! The console: a 16550 UART, polled.
//!
//! Every byte is an exit to the host, so jobs print a line per result. The FIFO is on: the line
//! status is asked once per 16 bytes only.

use core::fmt::{self, Write};

use forkvm_abi::SERIAL_PORT;
use spin::Mutex;

use crate::port;

/// Register offsets and bits of the 16550 (TL16C550C data sheet, section 8).
const DATA: u16 = SERIAL_PORT;
const INTERRUPT_ENABLE: u16 = SERIAL_PORT + 1;
const FIFO_CONTROL: u16 = SERIAL_PORT + 2;
const LINE_STATUS: u16 = SERIAL_PORT + 5;
const FIFO_ENABLE: u8 = 1;
const RECEIVED_DATA: u8 = 1;
const DATA_READY: u8 = 1 << 0;
const TRANSMITTER_EMPTY: u8 = 1 << 5;
const FIFO_LEN: u8 = 16;

static CONSOLE: Mutex<Console> = Mutex::new(Console {
    room: 0,
    fifo: false,
});

struct Console {
    /// Bytes that can be written before the line status has to be asked again.
    room: u8,
    fifo: bool,
}

impl Console {
    fn put(&mut self, byte: u8) {
        if !self.fifo {
            port::write8(FIFO_CONTROL, FIFO_ENABLE);
            self.fifo = true;
        }
        if self.room == 0 {
            while port::read8(LINE_STATUS) & TRANSMITTER_EMPTY == 0 {
                core::hint::spin_loop();
            }
            self.room = FIFO_LEN;
        }
        port::write8(DATA, byte);
        self.room -= 1;
    }
}

impl Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.bytes().for_each(|byte| self.put(byte));
        Ok(())
    }
}

/// Prints to the console; a line from one vCPU is not mixed with another's.
pub fn print(text: fmt::Arguments<'_>) {
    // The console itself never fails, and what a `Display` fails with has no other place to go.
    if CONSOLE.lock().write_fmt(text).is_err() {}
}

/// Prints although a vCPU may have stopped while it held the console: for the last words.
pub fn print_last_words(text: fmt::Arguments<'_>) {
    let mut console = Console {
        room: 0,
        fifo: true,
    };
    if console.write_fmt(text).is_err() {}
}

/// Lets the UART raise its interrupt for input.
pub fn interrupt_on_input() {
    port::write8(INTERRUPT_ENABLE, RECEIVED_DATA);
}

/// Whether a byte was typed that [`read`] has not returned.
pub fn has_input() -> bool {
    port::read8(LINE_STATUS) & DATA_READY != 0
}

/// A byte that was typed, if there is one.
pub fn read() -> Option<u8> {
    has_input().then(|| port::read8(DATA))
}

/// Prints a line to the console.
#[macro_export]
macro_rules! println {
    ($($text:tt)*) => { $crate::serial::print(format_args!("{}\n", format_args!($($text)*))) };
}
