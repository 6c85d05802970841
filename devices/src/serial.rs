//! The serial console: a 16550 UART, as on a PC's COM1.
//!
//! The registers are vm-superio's. This module connects them to an [`InterruptLine`] and to a
//! writer, and saves them whole. It reads no terminal: whoever has input for the guest hands it to
//! [`Serial::enqueue`].

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, SerialState};

use crate::device::{Device, DeviceError, Effect, InterruptLine};
use crate::section::{SavedState, Section};

/// Bit of the interrupt identification register that says "nothing is pending".
const NOTHING_PENDING: u8 = 1;

/// The registers. They write into a buffer and wish for interrupts; [`Serial`] carries both out.
/// So restoring them has no effect outside, and no console can fail inside them.
type Uart = vm_superio::Serial<Wish, NoEvents, Vec<u8>>;

/// A 16550 UART.
pub struct Serial {
    uart: Uart,
    interrupt: Arc<dyn InterruptLine>,
    out: Box<dyn Write + Send>,
    /// The writer failed before; that was said once.
    out_failed: bool,
}

impl Serial {
    /// A UART after reset. What the guest transmits goes to `out`, flushed after every access;
    /// when `out` fails the bytes are lost, and the guest does not notice.
    pub fn new(interrupt: Arc<dyn InterruptLine>, out: Box<dyn Write + Send>) -> Serial {
        let uart = Uart::new(Wish::default(), Vec::new());
        Serial {
            uart,
            interrupt,
            out,
            out_failed: false,
        }
    }

    /// Puts input for the guest into the receive FIFO and says how many bytes fitted (the FIFO
    /// holds 64; none are taken in loopback mode). The caller offers the rest again later.
    pub fn enqueue(&mut self, input: &[u8]) -> usize {
        if self.uart.fifo_capacity() == 0 {
            return 0;
        }
        // The FIFO has room and a wish for an interrupt never fails, so there is no error left.
        let accepted = self.uart.enqueue_raw_bytes(input).unwrap_or(0);
        self.carry_out();
        accepted
    }

    /// Does what the registers asked for during an access.
    fn carry_out(&mut self) {
        let sent = self.uart.writer_mut();
        if !sent.is_empty() {
            let written = self.out.write_all(sent).and_then(|()| self.out.flush());
            sent.clear();
            if let Err(error) = written
                && !self.out_failed
            {
                self.out_failed = true;
                tracing::warn!(%error, "the console cannot be written; its output is lost");
            }
        }
        if self.uart.interrupt_evt().take()
            && let Err(error) = self.interrupt.pulse()
        {
            tracing::warn!(%error, "the interrupt of the serial console could not be raised");
        }
    }
}

impl Device for Serial {
    fn name(&self) -> &str {
        "serial"
    }

    /// Every byte is one access to the same register, as in a repeated `in`.
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for byte in data {
            *byte = u8::try_from(offset).map_or(0, |register| self.uart.read(register));
        }
    }

    /// Every byte is one access to the same register, as in a repeated `out`.
    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        let Ok(register) = u8::try_from(offset) else {
            return Effect::None;
        };
        for byte in data {
            if let Err(error) = self.uart.write(register, *byte) {
                tracing::trace!(%error, register, "the UART refused a write");
            }
        }
        self.carry_out();
        Effect::None
    }

    fn save(&self) -> Result<Section, DeviceError> {
        Ok(Section::encode(
            "dev/serial",
            &SavedSerial::from(self.uart.state()),
        )?)
    }

    fn restore(&mut self, section: &Section) -> Result<(), DeviceError> {
        let saved: SavedSerial = section.decode()?;
        let state = SerialState::from(saved);
        self.uart =
            Uart::from_state(&state, Wish::default(), NoEvents, Vec::new()).map_err(|error| {
                DeviceError::Inconsistent {
                    device: "serial".into(),
                    what: error.to_string(),
                }
            })?;
        Ok(())
    }

    fn activate(&mut self) -> Result<(), DeviceError> {
        if self.uart.state().interrupt_identification & NOTHING_PENDING == 0 {
            // The same edge serves what the registers wished for while they were restored.
            self.uart.interrupt_evt().take();
            self.interrupt
                .pulse()
                .map_err(|source| DeviceError::Interrupt {
                    device: "serial".into(),
                    source,
                })?;
        }
        Ok(())
    }
}

/// A wish for an interrupt, which never fails.
#[derive(Debug, Default)]
struct Wish(AtomicBool);

impl Wish {
    fn take(&self) -> bool {
        self.0.swap(false, Ordering::Relaxed)
    }
}

impl Trigger for Wish {
    type E = std::convert::Infallible;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.store(true, Ordering::Relaxed);
        Ok(())
    }
}

/// All registers of the UART.
#[derive(Serialize, Deserialize)]
struct SavedSerial {
    baud_divisor_low: u8,
    baud_divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    #[serde(with = "serde_bytes")]
    in_buffer: Vec<u8>,
}

impl SavedState for SavedSerial {
    const VERSION: u16 = 1;
}

impl From<SerialState> for SavedSerial {
    fn from(state: SerialState) -> Self {
        SavedSerial {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.in_buffer,
        }
    }
}

impl From<SavedSerial> for SerialState {
    fn from(saved: SavedSerial) -> Self {
        SerialState {
            baud_divisor_low: saved.baud_divisor_low,
            baud_divisor_high: saved.baud_divisor_high,
            interrupt_enable: saved.interrupt_enable,
            interrupt_identification: saved.interrupt_identification,
            line_control: saved.line_control,
            line_status: saved.line_status,
            modem_control: saved.modem_control,
            modem_status: saved.modem_status,
            scratch: saved.scratch,
            in_buffer: saved.in_buffer,
        }
    }
}
