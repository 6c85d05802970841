//! The fork doorbell from user space: who may ring it, and what comes of it.
//!
//! The layout is [`forkvm_abi::doorbell`]'s. [`connect`] finds the device and leaves it to one thread
//! (`owner`), which alone holds the ports and the page (`page`, `port`). [`Doorbell`] is the seam: tests put a
//! machine of their own behind it, and [`Absent`] stands where there is no device.

mod owner;
mod page;
mod port;

use std::io;

use forkvm_agent_protocol::Generation;
use thiserror::Error;

pub use owner::{Hardware, connect};

/// Who a machine is, as its host says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Who {
    /// 0 in a machine that was booted or was the parent of its last fork.
    pub clone_id: u32,
    /// What no other machine has.
    pub generation: Generation,
}

/// A fork that took place. Each machine of it has its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fork {
    /// 0 in the parent, 1..=granted in the clones.
    pub clone_id: u32,
    /// Clones that there are.
    pub granted: u32,
    /// What the parent joins by.
    pub ticket: u32,
    /// Of this machine, now.
    pub generation: Generation,
}

/// The host's end of a machine.
pub trait Doorbell: Send + Sync {
    /// Who this machine is now; `None` where no host says it.
    fn who(&self) -> Option<Who>;
    /// Forks this machine. Returns in the parent and in each clone.
    ///
    /// # Errors
    /// Nothing was forked.
    fn fork(&self, clones: u32) -> Result<Fork, DoorbellError>;
    /// Waits for the clones of a fork: their worst exit status. The vCPU that asks stands still meanwhile.
    ///
    /// # Errors
    /// There is no such fork, or it was joined.
    fn join(&self, ticket: u32) -> Result<u32, DoorbellError>;
    /// Tells the host that the machine can be forked.
    fn report_ready(&self);
    /// Ends the machine at once. Returns where the host does not do it.
    fn exit(&self, status: u8);
}

/// Why the doorbell did not ring.
#[derive(Clone, Debug, Error)]
pub enum DoorbellError {
    /// Another VMM, or none.
    #[error("this machine has no fork doorbell ({0}); only forkvm's machines can fork themselves")]
    Absent(String),
    /// The host's answer.
    #[error("the host refused to {call}: {}", io::Error::from_raw_os_error(*errno))]
    Refused {
        /// What was asked for.
        call: &'static str,
        /// Linux's number.
        errno: i32,
    },
    /// It failed on this side of the port.
    #[error("ringing the fork doorbell: {0}")]
    Broken(String),
}

impl DoorbellError {
    /// Linux's number for it.
    pub fn errno(&self) -> i32 {
        match self {
            DoorbellError::Absent(_) => libc::ENOSYS,
            DoorbellError::Refused { errno, .. } => *errno,
            DoorbellError::Broken(_) => libc::EIO,
        }
    }
}

/// A machine without a doorbell.
pub struct Absent {
    reason: String,
}

impl Absent {
    /// `reason` is what who asks for a fork is told.
    pub fn new(reason: &str) -> Absent {
        Absent {
            reason: reason.into(),
        }
    }
}

impl Doorbell for Absent {
    fn who(&self) -> Option<Who> {
        None
    }

    fn fork(&self, _clones: u32) -> Result<Fork, DoorbellError> {
        Err(DoorbellError::Absent(self.reason.clone()))
    }

    fn join(&self, _ticket: u32) -> Result<u32, DoorbellError> {
        Err(DoorbellError::Absent(self.reason.clone()))
    }

    fn report_ready(&self) {}

    fn exit(&self, _status: u8) {}
}
