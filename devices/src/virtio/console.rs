//! The console device (virtio 1.2 section 5.3) with one port, of bytes only.
//!
//! What the guest transmits goes to a writer, and input for it is handed in by whoever has some, as
//! with the [serial console](crate::Serial). There is no size of a window, no second port and no
//! emergency write.

use std::io::Write;

use serde::{Deserialize, Serialize};

use crate::virtio::chain::Buffers;
use crate::virtio::refusal::{Refusal, written};
use crate::virtio::{Chain, MmioTransport, VirtioDevice};
use crate::{Brake, GuestMemory};

/// Device ID of a console device.
const DEVICE_TYPE: u32 = 3;

/// Section 5.3.2: receive and transmit, of port 0.
const QUEUE_SIZES: &[u16] = &[64, 64];
const RECEIVE: usize = 0;

/// Most bytes of input that wait for the guest.
const MOST_INPUT: usize = 4096;

/// Most bytes that one request transmits; the rest of it is lost. Drivers send a page or a few, and a
/// machine that is to stand still waits for the request.
const MOST_PER_REQUEST: u64 = 1 << 20;

/// Bytes that are on their way to the writer at once.
const PART_LEN: usize = 4096;

/// A console with one port.
pub struct Console {
    out: Box<dyn Write + Send>,
    /// The writer failed before; that was said once.
    out_failed: bool,
    /// Input that the guest has not had yet.
    input: Vec<u8>,
}

impl Console {
    /// A console whose output goes to `out`, flushed after each request; when `out` fails the bytes
    /// are lost, and the guest does not notice. A guest's vCPU waits while `out` does.
    pub fn new(out: Box<dyn Write + Send>) -> Console {
        Console {
            out,
            out_failed: false,
            input: Vec::new(),
        }
    }

    fn transmit(
        &mut self,
        data: &mut Buffers,
        memory: &GuestMemory,
        brake: &Brake,
    ) -> Result<(), Refusal> {
        let mut left = data.len().min(MOST_PER_REQUEST) as usize;
        let mut part = [0; PART_LEN];
        while left > 0 {
            let part = &mut part[..left.min(PART_LEN)];
            data.read(memory, part)?;
            brake.vouch()?;
            if let Err(error) = self.out.write_all(part) {
                self.out_lost(&error);
            }
            left -= part.len();
        }
        if let Err(error) = self.out.flush() {
            self.out_lost(&error);
        }
        if !data.is_empty() {
            tracing::debug!(lost = data.len(), "console: a request is too long");
        }
        Ok(())
    }

    fn out_lost(&mut self, error: &std::io::Error) {
        if !std::mem::replace(&mut self.out_failed, true) {
            tracing::warn!(%error, "the virtio console cannot be written; its output is lost");
        }
    }

    fn receive(&mut self, room: &mut Buffers, memory: &GuestMemory) -> Result<u32, Refusal> {
        let len = room.len().min(self.input.len() as u64) as usize;
        room.write(memory, &self.input[..len])?;
        self.input.drain(..len);
        Ok(len as u32)
    }
}

impl MmioTransport<Console> {
    /// Takes input for the guest, hands over what its driver has room for, and says how many bytes
    /// were taken: 4096 at most wait for the guest. The caller offers the rest again later. To be called
    /// at any time, by any thread.
    pub fn enqueue(&mut self, input: &[u8]) -> usize {
        let pending = &mut self.model_mut().input;
        let len = input.len().min(MOST_INPUT - pending.len());
        pending.extend(&input[..len]);
        self.serve_from_outside();
        len
    }
}

impl VirtioDevice for Console {
    type State = SavedConsole;

    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn takes(&self, queue: usize) -> bool {
        queue != RECEIVE || !self.input.is_empty()
    }

    fn serve(
        &mut self,
        queue: usize,
        mut request: Chain,
        _features: u64,
        memory: &GuestMemory,
        brake: &Brake,
    ) -> u32 {
        let served = match (request.fault, queue) {
            (Some(fault), _) => Err(Refusal::Chain(fault)),
            (None, RECEIVE) => self.receive(&mut request.writable, memory),
            (None, _) => self
                .transmit(&mut request.readable, memory, brake)
                .map(|()| 0),
        };
        written("console", queue, served)
    }

    fn save(&self) -> SavedConsole {
        SavedConsole {
            input: self.input.clone(),
        }
    }

    fn restore(&mut self, state: SavedConsole) -> Result<(), String> {
        if state.input.len() > MOST_INPUT {
            return Err(format!(
                "{} bytes of input wait, and there is room for {MOST_INPUT}",
                state.input.len()
            ));
        }
        self.input = state.input;
        Ok(())
    }
}

/// What a console saves.
#[derive(Debug, Serialize, Deserialize)]
pub struct SavedConsole {
    #[serde(with = "serde_bytes")]
    input: Vec<u8>,
}
