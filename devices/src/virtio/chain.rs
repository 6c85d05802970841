//! A request of a driver: its descriptor chain taken apart and checked (virtio 1.2 section 2.7).
//!
//! A driver can write any chain into its memory. Here it becomes two lists of buffers, and a
//! [`Fault`] when a well-behaved driver cannot have written it. Buffers are consumed from the
//! front; every byte of guest memory is copied at most once per call, so a guest that changes it
//! meanwhile gains nothing.

use std::collections::VecDeque;

use thiserror::Error;
use virtio_queue::DescriptorChain;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

use crate::GuestMemory;

/// A request: what the driver wrote for the device, and room for the device's answer.
#[derive(Debug)]
pub struct Chain {
    /// Buffers that the device may only read, in order.
    pub readable: Buffers,
    /// Buffers that the device may only write, in order.
    pub writable: Buffers,
    /// What is wrong with the chain, if anything. The buffers that could be found are there, but
    /// may lie outside of RAM: accesses to those fail.
    pub fault: Option<Fault>,
}

impl Chain {
    /// Takes a chain of at most `longest` descriptors apart.
    pub(crate) fn collect(
        chain: DescriptorChain<&GuestMemory>,
        longest: u16,
        memory: &GuestMemory,
    ) -> Chain {
        let mut collected = Chain::empty();
        let mut more = true;
        for (count, descriptor) in chain.enumerate() {
            if count >= usize::from(longest) {
                return collected.with(Fault::TooLong);
            }
            more = descriptor.has_next();
            let (address, len) = (descriptor.addr(), descriptor.len());
            // After these two the walk goes on: the place for a status may still be found.
            if len > 0 && !memory.check_range(address, len as usize) {
                collected = collected.with(Fault::OutOfRam);
            }
            if descriptor.is_write_only() {
                collected.writable.push(address, len);
            } else if collected.writable.is_empty() {
                collected.readable.push(address, len);
            } else {
                collected = collected.with(Fault::ReadableAfterWritable);
            }
        }
        // The iterator ends early, without a word, at whatever it cannot follow.
        if more {
            collected.with(Fault::Cut)
        } else {
            collected
        }
    }

    fn empty() -> Chain {
        Chain {
            readable: Buffers::default(),
            writable: Buffers::default(),
            fault: None,
        }
    }

    fn with(mut self, fault: Fault) -> Chain {
        self.fault = Some(fault);
        self
    }
}

/// What no well-behaved driver does to a chain.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum Fault {
    /// The chain is a loop, or longer than its queue (section 2.7.5.3.1 forbids it for indirect
    /// tables too).
    #[error("the descriptor chain is longer than its queue")]
    TooLong,
    /// A descriptor promises a next one that is not there, or the whole exceeds 2^32 bytes.
    #[error("the descriptor chain is cut off or circular, or describes more than 4 GiB")]
    Cut,
    /// Section 2.7.4.2: readable buffers come first.
    #[error("a device-readable buffer follows a device-writable one")]
    ReadableAfterWritable,
    /// A buffer is not guest RAM.
    #[error("a buffer lies outside of guest RAM")]
    OutOfRam,
}

/// Buffers in guest memory, read or written from the front.
#[derive(Debug, Default)]
pub struct Buffers {
    /// Not yet consumed; none is empty.
    segments: VecDeque<(GuestAddress, u32)>,
}

impl Buffers {
    fn push(&mut self, address: GuestAddress, len: u32) {
        if len > 0 {
            self.segments.push_back((address, len));
        }
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }

    /// Bytes that are left.
    pub fn len(&self) -> u64 {
        self.segments.iter().map(|&(_, len)| u64::from(len)).sum()
    }

    /// Takes the last byte away and returns its address, unless that wraps around.
    pub fn take_last_byte(&mut self) -> Option<GuestAddress> {
        let (address, len) = self.segments.pop_back()?;
        self.push(address, len - 1);
        address.checked_add(u64::from(len - 1))
    }

    /// Consumes and copies bytes until `data` is full. An error when fewer are left.
    pub fn read(&mut self, memory: &GuestMemory, data: &mut [u8]) -> Result<(), BufferError> {
        let mut done = 0;
        while done < data.len() {
            let (address, len) = self.take_front(data.len() - done)?;
            memory.read_slice(&mut data[done..done + len], address)?;
            done += len;
        }
        Ok(())
    }

    /// Consumes room and copies all of `data` into it. An error when there is less room.
    pub fn write(&mut self, memory: &GuestMemory, data: &[u8]) -> Result<(), BufferError> {
        let mut done = 0;
        while done < data.len() {
            let (address, len) = self.take_front(data.len() - done)?;
            memory.write_slice(&data[done..done + len], address)?;
            done += len;
        }
        Ok(())
    }

    /// Consumes up to `most` (1 or more) bytes of the front buffer.
    fn take_front(&mut self, most: usize) -> Result<(GuestAddress, usize), BufferError> {
        let (address, len) = self.segments.pop_front().ok_or(BufferError::TooShort)?;
        let taken = u32::try_from(most).unwrap_or(u32::MAX).min(len);
        if taken < len {
            // Wraps only where the address is not RAM, and the access fails.
            let rest = GuestAddress(address.0.wrapping_add(u64::from(taken)));
            self.segments.push_front((rest, len - taken));
        }
        Ok((address, taken as usize))
    }
}

/// Why bytes could not be moved between a request's buffers and the device.
#[derive(Debug, Error)]
pub enum BufferError {
    /// The driver gave fewer bytes than the request needs.
    #[error("the request's buffers are too short")]
    TooShort,
    /// Guest memory could not be accessed.
    #[error("guest memory of the request's buffers cannot be accessed")]
    Memory(#[from] GuestMemoryError),
}
