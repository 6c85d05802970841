//! A bell: wakes a thread that waits in poll(2) for something that is no descriptor.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::{Errno, read, write};

/// An eventfd.
#[derive(Debug)]
pub(super) struct Bell(OwnedFd);

impl Bell {
    pub(super) fn new() -> io::Result<Bell> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(Bell(eventfd(0, flags)?))
    }

    /// Never waits.
    pub(super) fn ring(&self) {
        match write(&self.0, &1u64.to_ne_bytes()) {
            // It was rung 2^64 - 2 times and nobody listened: it still rings.
            Ok(_) | Err(Errno::AGAIN) => {}
            Err(error) => tracing::error!(%error, "a thread that waits could not be woken"),
        }
    }

    /// It is silent until it is rung again.
    pub(super) fn silence(&self) {
        match read(&self.0, &mut [0; 8]) {
            Ok(_) | Err(Errno::AGAIN) => {}
            Err(error) => tracing::error!(%error, "a thread that waits is woken for nothing"),
        }
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
