//! One session: greetings, a request, and frames from then on.

use std::io::BufReader;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use forkvm_agent_protocol::{AgentFrame, ClientFrame, FrameError, Hello, Request, frame};

use super::error::AgentError;

/// A stream on which a request was sent.
pub(super) struct Session {
    stream: UnixStream,
    inbox: BufReader<UnixStream>,
    /// How long a read or a write may take; `None` is for ever.
    limit: Option<Duration>,
}

impl Session {
    /// Greets and asks. `stream` has its deadlines, of `limit`.
    pub(super) fn begin(
        stream: UnixStream,
        request: Request,
        limit: Duration,
    ) -> Result<Session, AgentError> {
        let inbox = BufReader::new(stream.try_clone().map_err(AgentError::Broken)?);
        let mut session = Session {
            stream,
            inbox,
            limit: Some(limit),
        };
        // Both at once: a round trip is dear where the guest's kernel is interpreted. An agent that turns a client away may
        // have hung up by now, with its reason on the stream.
        let said = session
            .say(&ClientFrame::Hello(Hello::new(0)))
            .and_then(|()| session.say(&ClientFrame::Request(request)));
        match session.hear() {
            Ok(AgentFrame::Hello(hello)) => match hello.fault() {
                None => said.map(|()| session),
                Some(fault) => Err(AgentError::Stranger(fault)),
            },
            Ok(other) => Err(AgentError::unexpected(&other)),
            Err(error) => Err(error),
        }
    }

    pub(super) fn say(&mut self, one: &ClientFrame) -> Result<(), AgentError> {
        frame::write(&mut self.stream, one).map_err(|error| AgentError::of_frame(error, self.limit))
    }

    /// The agent's next frame; a refusal is an error.
    pub(super) fn hear(&mut self) -> Result<AgentFrame, AgentError> {
        match frame::read(&mut self.inbox) {
            Ok(Some(AgentFrame::Refused(refusal))) => Err(AgentError::Refused(refusal)),
            Ok(Some(frame)) => Ok(frame),
            Ok(None) => Err(AgentError::Broken(std::io::ErrorKind::UnexpectedEof.into())),
            Err(error @ FrameError::Cut) => Err(AgentError::Broken(std::io::Error::other(error))),
            Err(error) => Err(AgentError::of_frame(error, self.limit)),
        }
    }

    /// From here on an answer may take for ever.
    pub(super) fn wait_without_limit(&mut self) -> Result<(), AgentError> {
        self.limit = None;
        self.stream
            .set_read_timeout(None)
            .and_then(|()| self.stream.set_write_timeout(None))
            .map_err(AgentError::Broken)
    }

    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }
}
