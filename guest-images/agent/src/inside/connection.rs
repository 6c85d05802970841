//! A session of `forkvm-guest` with the agent of its machine.

use std::env;
use std::io::BufReader;
use std::os::unix::net::UnixStream;

use forkvm_agent_protocol::{AgentFrame, ClientFrame, Hello, LOCAL_SOCKET, Request, frame};

use super::InsideError;

/// Names another socket than [`LOCAL_SOCKET`].
const SOCKET_VARIABLE: &str = "FORKVM_AGENT_SOCKET";

/// A session.
pub(super) struct Connection {
    stream: UnixStream,
    inbox: BufReader<UnixStream>,
}

impl Connection {
    pub(super) fn open() -> Result<Connection, InsideError> {
        let path = env::var_os(SOCKET_VARIABLE).unwrap_or_else(|| LOCAL_SOCKET.into());
        let open = || {
            let stream = UnixStream::connect(&path)?;
            let inbox = BufReader::new(stream.try_clone()?);
            Ok(Connection { stream, inbox })
        };
        open().map_err(|source| InsideError::NoAgent {
            path: path.to_string_lossy().into_owned(),
            source,
        })
    }

    /// Greets, asks, and returns the first answer.
    pub(super) fn ask(&mut self, request: Request) -> Result<AgentFrame, InsideError> {
        self.say(&ClientFrame::Hello(Hello::new(0)))?;
        self.say(&ClientFrame::Request(request))?;
        match self.hear()? {
            AgentFrame::Hello(hello) => match hello.fault() {
                None => self.hear(),
                Some(fault) => Err(InsideError::Nonsense(fault)),
            },
            other => Err(unexpected(&other)),
        }
    }

    pub(super) fn say(&mut self, one: &ClientFrame) -> Result<(), InsideError> {
        Ok(frame::write(&mut self.stream, one)?)
    }

    /// The next frame. It may take as long as clones live.
    pub(super) fn hear(&mut self) -> Result<AgentFrame, InsideError> {
        match frame::read(&mut self.inbox)? {
            Some(AgentFrame::Refused(refusal)) => Err(InsideError::Refused(refusal.text)),
            Some(frame) => Ok(frame),
            None => Err(InsideError::Nonsense("it hung up without an answer".into())),
        }
    }
}

pub(super) fn unexpected(frame: &AgentFrame) -> InsideError {
    InsideError::Nonsense(format!("it answered {frame:?}"))
}
