//! What goes wrong between host and agent.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use forkvm_agent_protocol::{AgentFrame, FrameError, Refusal};
use thiserror::Error;

/// Why the agent did not do it.
#[derive(Debug, Error)]
pub enum AgentError {
    /// Nobody answered in time.
    #[error(
        "the agent behind {} did not answer in time; seen last: {last}; the machine's console says how far it came",
        socket.display()
    )]
    NotYet {
        /// The machine's Unix socket.
        socket: PathBuf,
        /// The last try.
        last: Box<AgentError>,
    },
    /// The socket of the machine.
    #[error("connecting to {}: {source}", socket.display())]
    Connect {
        /// The machine's Unix socket.
        socket: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Nobody listens at the agent's port.
    #[error("the guest refused the connection to its port {0}: no agent listens there")]
    NobodyListens(u32),
    /// The stream ended or failed.
    #[error("the connection to the agent broke: {0}")]
    Broken(#[source] io::Error),
    /// No answer.
    #[error(
        "the agent did not answer for {} s: the machine is stopped, or busy beyond that",
        .0.as_secs_f64()
    )]
    Silent(Duration),
    /// Not the protocol.
    #[error("whoever answers for the agent speaks nonsense: {0}")]
    Nonsense(String),
    /// Another version, or something else altogether.
    #[error("no agent of this release: {0}")]
    Stranger(String),
    /// The agent's word.
    #[error("{}", .0.text)]
    Refused(Refusal),
    /// Not one that can be sent to a program.
    #[error("there is no signal {0}: 1 to 31 can be sent")]
    NoSignal(u8),
    /// What a file's content, or a program's input, is read from.
    #[error("reading what shall be sent to the guest: {0}")]
    Source(#[source] io::Error),
    /// What a file's content, or a program's output, is written to.
    #[error("writing what came from the guest: {0}")]
    Sink(#[source] io::Error),
    /// No thread.
    #[error("starting a thread: {0}")]
    Thread(#[source] io::Error),
}

impl AgentError {
    pub(super) fn unexpected(frame: &AgentFrame) -> AgentError {
        // Its bytes may be many.
        let text = format!("{frame:?}");
        let start: String = text.chars().take(80).collect();
        AgentError::Nonsense(format!("a frame out of its turn: {start}"))
    }

    /// Of a frame that did not come, or did not go.
    pub(super) fn of_frame(error: FrameError, limit: Option<Duration>) -> AgentError {
        match (error, limit) {
            (FrameError::Stream(error), Some(limit)) if is_timeout(&error) => {
                AgentError::Silent(limit)
            }
            (FrameError::Stream(error), _) => AgentError::Broken(error),
            (error, _) => AgentError::Nonsense(error.to_string()),
        }
    }

    /// Whether it may go another way a moment later: a machine boots, an agent has too many sessions.
    pub fn may_pass(&self) -> bool {
        match self {
            AgentError::Stranger(_) => false,
            AgentError::Refused(refusal) => refusal.errno == libc::EAGAIN,
            _ => true,
        }
    }
}

/// A socket whose deadline has passed.
pub(super) fn is_timeout(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    )
}
