//! Virtio devices (virtio 1.2): what a device is to its transport, and the devices.
//!
//! [`mmio`] is the transport: registers, negotiation, queues and interrupts. A [`VirtioDevice`] is
//! the rest of a device, and sees one request after the other, already taken apart ([`Chain`]).

pub mod blk;
pub mod chain;
pub mod console;
pub mod mmio;
mod queue_pass;
mod refusal;
pub mod rng;
mod saved_queue;
pub mod vsock;

pub use blk::{Blk, BlkCounters};
pub use chain::Chain;
pub use console::Console;
pub use mmio::MmioTransport;
pub use rng::Rng;
pub use vsock::Vsock;

use serde::{Serialize, de::DeserializeOwned};

use crate::{Brake, GuestMemory};

/// A kind of virtio device, without what is common to all of them.
pub trait VirtioDevice: Send {
    /// What the device itself saves, beside negotiation and queues. It is part of the section of
    /// its transport: a change raises that section's version.
    type State: Serialize + DeserializeOwned;

    /// Device ID (virtio 1.2 section 5).
    fn device_type(&self) -> u32;

    /// Feature bits of this kind of device (bits 0 to 23 and 50 to 127 are its own; the transport
    /// adds those of queues and of the transport). None, unless a device says otherwise.
    fn features(&self) -> u64 {
        0
    }

    /// Largest size of each queue: powers of two, at most 32768.
    fn queue_sizes(&self) -> &'static [u16];

    /// Fills `data` from `offset` of the device's configuration space; zero beyond its end, and all of it
    /// where every field belongs to a feature that is not offered.
    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    /// Whether the device has a use for a request of queue `queue` now. One that it has no use for
    /// stays in its ring, where it costs nothing and is saved with the ring: a buffer for what has not
    /// arrived yet, or a request whose answer would find no room.
    ///
    /// Asked before each request, and for every queue again after any was served. What happens
    /// outside of the guest and changes the answer is followed by
    /// [`MmioTransport::serve_from_outside`].
    fn takes(&self, _queue: usize) -> bool {
        true
    }

    /// Serves a request of queue `queue`, where the driver accepted `features`, and returns how
    /// many bytes it wrote into the request's writable buffers. The driver gets the request back
    /// in any case, but when the machine is condemned.
    ///
    /// Reading guest memory may wait for a page. After that, and before it acts on what it read, a
    /// device asks `brake` to [vouch](Brake::vouch) for it; in a condemned machine it does nothing.
    fn serve(
        &mut self,
        queue: usize,
        request: Chain,
        features: u64,
        memory: &GuestMemory,
        brake: &Brake,
    ) -> u32;

    /// The driver has reset the device. What it has told the device before counts no more.
    fn reset(&mut self) {}

    /// The device's own state.
    fn save(&self) -> Self::State;

    /// Takes over a saved state; an error says what does not fit, and changes nothing.
    fn restore(&mut self, state: Self::State) -> Result<(), String>;
}

/// Copies what of `config` lies at `offset`, and zeroes the rest of `data`.
fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    let rest = usize::try_from(offset)
        .ok()
        .and_then(|offset| config.get(offset..))
        .unwrap_or(&[]);
    let len = rest.len().min(data.len());
    data[..len].copy_from_slice(&rest[..len]);
    data[len..].fill(0);
}
