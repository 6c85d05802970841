//! The host's side of the agent in a guest ([`forkvm_agent_protocol`], docs/agent.md).
//!
//! A client knows where a machine's vsock is and opens a session for each request. It starts and ends no machine, and prints
//! nothing: a command line gives it streams ([`Running::pump`]). Every call has a deadline, but a program may run
//! for as long as it likes.

mod connect;
mod error;
mod exec;
mod files;
mod session;

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub use connect::Way;
pub use error::AgentError;
pub use exec::{Control, Running};
pub use files::Got;
pub use forkvm_agent_protocol as protocol;
use forkvm_agent_protocol::{AgentFrame, Exec, Forked, Healthy, Identified, Identity, Request};

use session::Session;

/// How long a request may take that does not wait for programs: a guest's kernel may be interpreted.
pub const REQUEST_LIMIT: Duration = Duration::from_secs(30);

/// An agent that has answered.
#[derive(Clone, Debug)]
pub struct AgentClient {
    socket: PathBuf,
    way: Way,
    limit: Duration,
}

impl AgentClient {
    /// Waits until the agent behind `vsock_socket`, a machine's Unix socket (docs/vsock.md), answers; at most until `deadline`.
    ///
    /// # Errors
    /// [`AgentError::NotYet`], with what was seen last. An agent of another version is told at once.
    pub fn connect(vsock_socket: &Path, deadline: Instant) -> Result<AgentClient, AgentError> {
        AgentClient::by(vsock_socket, Way::Vsock, deadline)
    }

    /// [`AgentClient::connect`] with an agent whose stream is reached in another way.
    ///
    /// # Errors
    /// As there.
    pub fn by(socket: &Path, way: Way, deadline: Instant) -> Result<AgentClient, AgentError> {
        connect::until_it_answers(socket, way, deadline)?;
        Ok(AgentClient {
            way,
            ..AgentClient::at(socket)
        })
    }

    /// The agent behind `vsock_socket`, whether it answers already or not.
    pub fn at(vsock_socket: &Path) -> AgentClient {
        AgentClient {
            socket: vsock_socket.to_owned(),
            way: Way::Vsock,
            limit: REQUEST_LIMIT,
        }
    }

    /// The same client, whose requests may take `limit`.
    #[must_use]
    pub fn with_limit(mut self, limit: Duration) -> AgentClient {
        self.limit = limit;
        self
    }

    /// Asks how the agent is.
    ///
    /// # Errors
    /// [`AgentError`].
    pub fn health(&self) -> Result<Healthy, AgentError> {
        match self.ask(Request::Health, self.limit)? {
            AgentFrame::Healthy(healthy) => Ok(healthy),
            other => Err(AgentError::unexpected(&other)),
        }
    }

    /// Gives the machine an identity. It has all of it once this returns, and must not go on if it fails. The guest's hooks may
    /// take until `deadline`.
    ///
    /// # Errors
    /// [`AgentError::Refused`] names the step that failed.
    pub fn identify(
        &self,
        identity: &Identity,
        deadline: Instant,
    ) -> Result<Identified, AgentError> {
        let left = deadline.saturating_duration_since(Instant::now());
        // A socket takes no limit of nothing.
        let limit = left.max(Duration::from_millis(1));
        match self.ask(Request::Identify(identity.clone()), limit)? {
            AgentFrame::Identified(identified) if identified.generation == identity.generation => {
                Ok(identified)
            }
            other => Err(AgentError::unexpected(&other)),
        }
    }

    /// Tells a machine that the host has forked it, and waits until its hooks have run as a parent's: names of those that did.
    ///
    /// # Errors
    /// [`AgentError::Refused`] names the hook that failed. The machine is who it was.
    pub fn after_fork(&self) -> Result<Vec<String>, AgentError> {
        match self.ask(Request::AfterFork, self.limit)? {
            AgentFrame::HooksRan(ran) => Ok(ran),
            other => Err(AgentError::unexpected(&other)),
        }
    }

    /// Has the machine fork itself; answers for the parent.
    ///
    /// # Errors
    /// [`AgentError::Refused`]: nothing was forked.
    pub fn fork(&self, clones: u32) -> Result<Forked, AgentError> {
        match self.ask(Request::Fork { clones }, self.limit)? {
            AgentFrame::Forked(forked) => Ok(forked),
            other => Err(AgentError::unexpected(&other)),
        }
    }

    /// Ends the machine in order: its programs, its disks, itself. Returns before it has ended.
    ///
    /// # Errors
    /// [`AgentError::Refused`] where the agent is not PID 1.
    pub fn power_off(&self) -> Result<(), AgentError> {
        match self.ask(Request::PowerOff, self.limit)? {
            AgentFrame::PoweringOff => Ok(()),
            other => Err(AgentError::unexpected(&other)),
        }
    }

    /// Starts a program. It is ended when the returned value is dropped.
    ///
    /// # Errors
    /// [`AgentError::Refused`]: it cannot be started, and why.
    pub fn exec(&self, exec: &Exec) -> Result<Running, AgentError> {
        let session = self.open(Request::Exec(exec.clone()), self.limit)?;
        Running::of(session)
    }

    /// Writes `length` bytes of `content` to `path` in the guest, with permissions `mode`. The file is there whole, or not at all.
    ///
    /// # Errors
    /// [`AgentError::Refused`], and [`AgentError::Source`] where `content` fails or ends early.
    pub fn put(
        &self,
        path: &Path,
        mode: u32,
        length: u64,
        content: &mut dyn Read,
    ) -> Result<(), AgentError> {
        let request = Request::Put {
            path: path.into(),
            mode,
            length,
        };
        files::put(self.open(request, self.limit)?, length, content)
    }

    /// Copies `path` of the guest to `to`.
    ///
    /// # Errors
    /// [`AgentError::Refused`], and [`AgentError::Sink`] where `to` fails.
    pub fn get(&self, path: &Path, to: &mut dyn Write) -> Result<Got, AgentError> {
        let request = Request::Get { path: path.into() };
        files::get(self.open(request, self.limit)?, to)
    }

    fn ask(&self, request: Request, limit: Duration) -> Result<AgentFrame, AgentError> {
        self.open(request, limit)?.hear()
    }

    /// A session in which `request` was sent. No answer of it may take longer than `limit`.
    fn open(&self, request: Request, limit: Duration) -> Result<Session, AgentError> {
        let stream = connect::open(&self.socket, self.way, limit)?;
        Session::begin(stream, request, limit)
    }
}
