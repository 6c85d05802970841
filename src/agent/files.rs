//! Files, one a session.

use std::io::{ErrorKind, Read, Write};

use forkvm_agent_protocol::{AgentFrame, Bytes, CHUNK, ClientFrame};

use super::error::AgentError;
use super::session::Session;

/// A file that came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Got {
    /// Its permissions in the guest.
    pub mode: u32,
    /// Bytes that came.
    pub length: u64,
}

pub(super) fn put(
    mut session: Session,
    length: u64,
    content: &mut dyn Read,
) -> Result<(), AgentError> {
    match session.hear()? {
        AgentFrame::Ready => {}
        other => return Err(AgentError::unexpected(&other)),
    }
    let mut content = content.take(length);
    let mut buffer = vec![0; CHUNK];
    let mut left = length;
    while left > 0 {
        let count = match content.read(&mut buffer) {
            Ok(0) => return Err(AgentError::Source(ErrorKind::UnexpectedEof.into())),
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(AgentError::Source(error)),
        };
        left -= count as u64;
        let sent = session.say(&ClientFrame::Data(Bytes::from(&buffer[..count])));
        if let Err(error) = sent {
            // The agent may have said why it no longer listens.
            return Err(match session.hear() {
                Err(refused @ AgentError::Refused(_)) => refused,
                _ => error,
            });
        }
    }
    match session.hear()? {
        AgentFrame::Stored => Ok(()),
        other => Err(AgentError::unexpected(&other)),
    }
}

pub(super) fn get(mut session: Session, to: &mut dyn Write) -> Result<Got, AgentError> {
    let mode = match session.hear()? {
        AgentFrame::File { mode, .. } => mode,
        other => return Err(AgentError::unexpected(&other)),
    };
    let mut length = 0;
    loop {
        match session.hear()? {
            AgentFrame::Data(Bytes(bytes)) => {
                to.write_all(&bytes).map_err(AgentError::Sink)?;
                length += bytes.len() as u64;
            }
            AgentFrame::DataEnd => break,
            other => return Err(AgentError::unexpected(&other)),
        }
    }
    to.flush().map_err(AgentError::Sink)?;
    Ok(Got { mode, length })
}
