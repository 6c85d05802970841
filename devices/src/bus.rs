//! Address ranges and the devices behind them: one type for I/O ports and for MMIO.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use thiserror::Error;

use crate::Brake;
use crate::device::{Device, Effect};

/// A device that a bus and its machine share.
pub type SharedDevice = Arc<Mutex<dyn Device>>;

/// Maps addresses to devices.
///
/// An access that no device decodes, or that crosses the end of a device's range, reads as all ones
/// and writes nothing, as on a PC. A repeated access to an I/O port (`rep outsb`) is several
/// accesses of the same width to the same address, and decoded as the first of them.
///
/// In a condemned machine no device decodes anything: a vCPU there may run on memory that never
/// was, until it is stopped.
#[derive(Clone)]
pub struct Bus {
    /// Start of a range -> its length and its device.
    ranges: BTreeMap<u64, (u64, SharedDevice)>,
    brake: Brake,
}

impl Bus {
    /// An empty bus of the machine that `brake` belongs to.
    pub fn new(brake: Brake) -> Bus {
        Bus {
            ranges: BTreeMap::new(),
            brake,
        }
    }

    /// Puts `device` at `start..start + len`.
    pub fn insert(&mut self, start: u64, len: u64, device: SharedDevice) -> Result<(), BusError> {
        let end = start
            .checked_add(len)
            .filter(|_| len > 0)
            .ok_or(BusError::Range { start, len })?;
        let clash = self
            .ranges
            .range(..end)
            .next_back()
            .filter(|(at, (len, _))| *at + len > start);
        if let Some((&at, &(taken, _))) = clash {
            return Err(BusError::Overlap {
                start,
                len,
                at,
                taken,
            });
        }
        self.ranges.insert(start, (len, device));
        Ok(())
    }

    /// Serves a read.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        self.read_repeated(address, data.len(), data);
    }

    /// Serves one read of `width` bytes of `address` after the other, until `data` is full.
    pub fn read_repeated(&self, address: u64, width: usize, data: &mut [u8]) {
        match self.decode(address, width) {
            Some((offset, device)) => lock(device).read(offset, data),
            None => {
                tracing::trace!(
                    address,
                    len = data.len(),
                    "read from an address without a device"
                );
                data.fill(0xff);
            }
        }
    }

    /// Serves a write.
    pub fn write(&self, address: u64, data: &[u8]) -> Effect {
        self.write_repeated(address, data.len(), data)
    }

    /// Serves one write of `width` bytes to `address` after the other, until `data` is through.
    pub fn write_repeated(&self, address: u64, width: usize, data: &[u8]) -> Effect {
        match self.decode(address, width) {
            Some((offset, device)) => lock(device).write(offset, data),
            None => {
                tracing::trace!(
                    address,
                    len = data.len(),
                    "write to an address without a device"
                );
                Effect::None
            }
        }
    }

    fn decode(&self, address: u64, len: usize) -> Option<(u64, &SharedDevice)> {
        if self.brake.condemned() {
            return None;
        }
        let (start, (size, device)) = self.ranges.range(..=address).next_back()?;
        let offset = address - start;
        (offset.checked_add(len as u64)? <= *size).then_some((offset, device))
    }
}

/// A device whose thread panicked is still the guest's only one: its state is what it last stored.
fn lock(device: &SharedDevice) -> std::sync::MutexGuard<'_, dyn Device + 'static> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Why a device could not be put on a bus.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum BusError {
    /// The range is empty or wraps around.
    #[error("bus range {start:#x} + {len:#x} is empty or wraps around")]
    Range {
        /// First address.
        start: u64,
        /// Length.
        len: u64,
    },
    /// The range is taken.
    #[error("bus range {start:#x} + {len:#x} overlaps the device at {at:#x} + {taken:#x}")]
    Overlap {
        /// First address.
        start: u64,
        /// Length.
        len: u64,
        /// First address of the device in the way.
        at: u64,
        /// Its length.
        taken: u64,
    },
}
