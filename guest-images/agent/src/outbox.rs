//! The agent's half of a session's stream: frames of several threads, whole.

use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use forkvm_agent_protocol::{AgentFrame, FrameError, frame};
use rustix::net::{Shutdown, shutdown};

/// Where a session's answers go.
pub(crate) struct Outbox {
    stream: Arc<File>,
    /// One frame at a time.
    turn: Mutex<()>,
    broken: AtomicBool,
}

impl Outbox {
    pub(crate) fn new(stream: Arc<File>) -> Outbox {
        Outbox {
            stream,
            turn: Mutex::new(()),
            broken: AtomicBool::new(false),
        }
    }

    /// Sends a frame; waits for a client that does not read.
    pub(crate) fn send(&self, one: &AgentFrame) -> Result<(), FrameError> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let sent = frame::write(&mut &*self.stream, one);
        if sent.is_err() {
            self.broken.store(true, Ordering::Release);
        }
        sent
    }

    /// Sends a frame, unless the client is gone: its going is heard by whoever reads the stream.
    pub(crate) fn send_if_heard(&self, one: &AgentFrame) {
        if !self.broken.load(Ordering::Acquire)
            && let Err(error) = self.send(one)
            && !matches!(error, FrameError::Stream(_))
        {
            crate::log::line(&format!("a frame could not be sent: {error}"));
        }
    }

    /// Ends the stream in both directions. What was sent still arrives; who reads here sees its end.
    pub(crate) fn close(&self) {
        if let Err(error) = shutdown(&*self.stream, Shutdown::Both)
            && error != rustix::io::Errno::NOTCONN
        {
            crate::log::line(&format!("ending a session's stream: {error}"));
        }
    }
}
