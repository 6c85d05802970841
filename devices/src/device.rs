//! What a device is to the machine that holds it.

use std::io;

use forkvm_abi::doorbell;
use thiserror::Error;

use crate::section::{Section, SectionError};

/// A device on a [`Bus`](crate::Bus).
///
/// Life of a device: built; then either the guest drives it from reset, or [`restore`] puts it in
/// the state that another device of its kind saved; [`activate`] before the vCPUs run; accesses;
/// [`save`] while all vCPUs are paused. Offsets count from the start of the device's range, and the
/// bus never passes an access that crosses its end; of a repeated port access that holds for each.
///
/// [`restore`]: Device::restore
/// [`activate`]: Device::activate
/// [`save`]: Device::save
pub trait Device: Send {
    /// Unique name within a machine, such as `serial` or `blk0`; its section is `dev/<name>`.
    fn name(&self) -> &str;

    /// Serves a read of 1, 2, 4 or 8 bytes (a repeated port access may pass more). Undecoded
    /// registers read as zero.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// Serves a write and says what it means to the vCPU. Rubbish is ignored, never an error.
    fn write(&mut self, offset: u64, data: &[u8]) -> Effect;

    /// The state that a device of this kind needs to go on where this one stands.
    fn save(&self) -> Result<Section, DeviceError>;

    /// Takes over the state of `section`, which was saved under this device's name. On an error the
    /// device is as it was.
    fn restore(&mut self, section: &Section) -> Result<(), DeviceError>;

    /// Called once after [`restore`](Device::restore), when all devices are restored and before a
    /// vCPU runs, and at any time after a pulled [`Brake`](crate::Brake) has left requests over:
    /// raises an interrupt that may have been lost between device and interrupt controller again
    /// (a spurious one is harmless) and serves what is in the queues.
    fn activate(&mut self) -> Result<(), DeviceError>;
}

/// What an access means to the vCPU that made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Effect {
    /// Go on.
    None,
    /// The guest asks for its machine to end with this status.
    Exit(u32),
    /// The guest rang the doorbell: hold the vCPU until the call is answered.
    Call(GuestCall),
    /// The guest told its host something; go on.
    Report(u32),
}

/// A call that waits in a slot of the doorbell page ([`forkvm_abi::doorbell`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestCall {
    /// Index of the slot, below [`doorbell::CALLS`].
    pub slot: u32,
    /// What is asked.
    pub op: GuestOp,
}

/// A known operation of [`doorbell::op`], decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestOp {
    /// [`doorbell::op::FORK`]: fork into this many clones.
    Fork(u32),
    /// [`doorbell::op::JOIN`]: wait for the clones of this ticket.
    Join(u32),
    /// [`doorbell::op::SAVE`]: save the machine.
    Save,
    /// [`doorbell::op::DISCARD`]: take pages of RAM back. All of them were RAM, and none was the
    /// doorbell page, when the guest rang.
    Discard {
        /// First page frame (guest-physical address / 4096).
        frame: u32,
        /// Number of pages, 1 or more.
        pages: u32,
    },
}

impl GuestOp {
    /// Decodes a call; `None` for an operation that this host does not know. `pages` is
    /// [`doorbell::Call::pages`].
    pub fn decode(op: u32, arg: u32, pages: u32) -> Option<GuestOp> {
        match op {
            doorbell::op::FORK => Some(GuestOp::Fork(arg)),
            doorbell::op::JOIN => Some(GuestOp::Join(arg)),
            doorbell::op::SAVE => Some(GuestOp::Save),
            doorbell::op::DISCARD => Some(GuestOp::Discard { frame: arg, pages }),
            _ => None,
        }
    }
}

/// An edge-triggered interrupt line, from a device to the interrupt controller.
pub trait InterruptLine: Send + Sync {
    /// Raises and lowers the line: one edge.
    fn pulse(&self) -> io::Result<()>;
}

/// Why a device could not be saved, restored or activated.
#[derive(Debug, Error)]
pub enum DeviceError {
    /// The section does not hold this device's state.
    #[error(transparent)]
    Section(#[from] SectionError),
    /// The state in the section cannot be that of a device of this kind in this machine.
    #[error("device {device}: its saved state is inconsistent: {what}")]
    Inconsistent {
        /// Name of the device.
        device: String,
        /// What does not fit.
        what: String,
    },
    /// The interrupt could not be raised again.
    #[error("device {device}: raising its interrupt failed")]
    Interrupt {
        /// Name of the device.
        device: String,
        /// What the interrupt controller said.
        source: io::Error,
    },
    /// A block layer failed while the device was drained or flushed.
    #[error("device {device}: its disk failed")]
    Disk {
        /// Name of the device.
        device: String,
        /// What the block layer said.
        source: io::Error,
    },
}
