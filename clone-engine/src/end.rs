//! How a VM of a family ended.

use std::fmt;

use forkvm_vmm::EndReason;
use serde::{Deserialize, Serialize};

/// The end of a VM. [`End::status`] is what JOIN counts with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum End {
    /// The guest ended itself through the exit device, with this status.
    Exited(u32),
    /// The guest powered itself off or asked for a reset.
    PoweredOff,
    /// It was killed from the host.
    Killed,
    /// It was the parent of a fork with freeze `stop`.
    Stopped,
    /// It was saved to disk rather than ended.
    Saved,
    /// The guest triple-faulted.
    TripleFault {
        /// The vCPU.
        vcpu: u32,
    },
    /// The host could not go on with it.
    Failed(String),
}

impl End {
    /// The guest's status; 0 for a power-off, a stop and a save; 128 + 9 for a kill; 255 for a
    /// triple fault or a failure.
    pub fn status(&self) -> u32 {
        match self {
            End::Exited(status) => *status,
            End::PoweredOff | End::Stopped | End::Saved => 0,
            End::Killed => 137,
            End::TripleFault { .. } | End::Failed(_) => 255,
        }
    }
}

impl From<EndReason> for End {
    fn from(reason: EndReason) -> End {
        match reason {
            EndReason::Exit(status) => End::Exited(status),
            EndReason::Reset | EndReason::PowerOff => End::PoweredOff,
            EndReason::TripleFault { vcpu } => End::TripleFault { vcpu },
            EndReason::Failed(error) => End::Failed(error.to_string()),
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            End::Exited(status) => write!(f, "exited with status {status}"),
            End::PoweredOff => f.write_str("powered itself off"),
            End::Killed => f.write_str("was killed"),
            End::Stopped => f.write_str("was stopped at its fork point"),
            End::Saved => f.write_str("was saved"),
            End::TripleFault { vcpu } => write!(f, "triple-faulted on vCPU {vcpu}"),
            End::Failed(why) => write!(f, "failed: {why}"),
        }
    }
}
