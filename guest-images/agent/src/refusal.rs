//! Errors on their way to a client.

use std::error::Error;
use std::io;

use forkvm_agent_protocol::Refusal;

/// A refusal that says `what` was tried, and why it failed.
pub(crate) fn of_io(what: &str, error: &io::Error) -> Refusal {
    Refusal {
        errno: error.raw_os_error().unwrap_or(libc::EIO),
        text: format!("{what}: {error}"),
    }
}

/// A refusal with the causes of `error` in one line.
pub(crate) fn of_error(errno: i32, error: &dyn Error) -> Refusal {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    Refusal { errno, text }
}

/// A refusal of what should not have been asked.
pub(crate) fn invalid(text: impl Into<String>) -> Refusal {
    Refusal {
        errno: libc::EINVAL,
        text: text.into(),
    }
}
