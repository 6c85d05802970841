//! Requests that a console or a socket device has no use for: the driver gets them back as they are.

use thiserror::Error;

use super::chain::{BufferError, Fault};
use crate::brake::Condemned;

/// Why a request is not carried out.
#[derive(Debug, Error)]
pub(super) enum Refusal {
    #[error(transparent)]
    Chain(Fault),
    #[error(transparent)]
    Buffers(#[from] BufferError),
    #[error(transparent)]
    Condemned(#[from] Condemned),
}

/// The bytes written into a request of queue `queue`: none where it was of no use.
pub(super) fn written(device: &str, queue: usize, served: Result<u32, Refusal>) -> u32 {
    match served {
        Ok(written) => written,
        Err(Refusal::Condemned(_)) => 0,
        Err(refusal) => {
            tracing::debug!(device, queue, %refusal, "a request is of no use");
            0
        }
    }
}
