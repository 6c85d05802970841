//! One session: greetings, one request, its answer.
//!
//! A client has `PATIENCE` to say what it wants, however slowly it says it; after that only an exec may last. Whatever goes wrong is said to the
//! client by a refusal, as far as it still listens, and ends the session and nothing else.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::sync::Arc;
use std::time::{Duration, Instant};

use forkvm_agent_protocol::{
    AgentFrame, ClientFrame, FrameError, Healthy, Hello, Refusal, Request, frame,
};
use rustix::net::sockopt::{Timeout, set_socket_timeout};

use crate::agent::{Agent, Last};
use crate::identity::clock_source;
use crate::outbox::Outbox;
use crate::refusal::{invalid, of_error, of_io};
use crate::{exec, files, forks};

/// How long a client may take over its greeting and its request together, and over the next bytes of a file.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long a client may not read what it asked for.
const PATIENCE_TO_READ: Duration = Duration::from_secs(60);

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// The host: it may ask for anything. Its streams do not survive in a clone.
    Host,
    /// A program of the guest, whose stream is in parent and clones alike.
    Local {
        /// It is root's: it may ask for anything as well. Others may ask for health and forks.
        root: bool,
    },
}

/// Frames of the client.
pub(crate) type Inbox = BufReader<Incoming>;

/// What a client sends: all of it until the deadline, where there is one.
pub(crate) struct Incoming {
    stream: Arc<File>,
    deadline: Option<Instant>,
}

impl Incoming {
    pub(crate) fn inbox(stream: Arc<File>) -> Inbox {
        BufReader::new(Incoming {
            stream,
            deadline: None,
        })
    }
}

impl Read for Incoming {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if let Some(deadline) = self.deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            set_socket_timeout(&self.stream, Timeout::Recv, Some(left))?;
        }
        self.stream.read(buffer)
    }
}

/// Serves the stream to its end.
pub fn serve(agent: &Agent, stream: Arc<File>, peer: Peer) {
    let outbox = Outbox::new(stream.clone());
    let mut inbox = Incoming::inbox(stream);
    let served = begin(agent, &mut inbox, &outbox, PATIENCE)
        .and_then(|request| answer(agent, peer, request, inbox, &outbox));
    if let Err(refusal) = served {
        outbox.send_if_heard(&AgentFrame::Refused(refusal));
    }
    outbox.close();
}

/// Limits how long a read of the stream may take, from here on each by itself.
pub(crate) fn limit(inbox: &mut Inbox, time: Option<Duration>) -> Result<(), Refusal> {
    let incoming = inbox.get_mut();
    incoming.deadline = None;
    let stream = &incoming.stream;
    let fail = |error: rustix::io::Errno| of_io("setting the stream's deadline", &error.into());
    set_socket_timeout(stream, Timeout::Recv, time).map_err(fail)?;
    let to_read = time.map(|_| PATIENCE_TO_READ);
    set_socket_timeout(stream, Timeout::Send, to_read).map_err(fail)
}

/// Both greetings, and the request, within `patience`: a client that sends a byte now and then holds no place for ever.
fn begin(
    agent: &Agent,
    inbox: &mut Inbox,
    outbox: &Outbox,
    patience: Duration,
) -> Result<Request, Refusal> {
    limit(inbox, Some(patience))?;
    inbox.get_mut().deadline = Some(Instant::now() + patience);
    let first = next(inbox)?;
    // Said to whoever speaks, so that one of another version can name this one.
    outbox.send_if_heard(&AgentFrame::Hello(Hello::new(agent.features())));
    match first {
        ClientFrame::Hello(hello) => {
            if let Some(fault) = hello.fault() {
                return Err(Refusal {
                    errno: libc::EPROTONOSUPPORT,
                    text: format!("the agent does not understand this client: {fault}"),
                });
            }
        }
        other => return Err(out_of_turn(&other)),
    }
    let request = match next(inbox)? {
        ClientFrame::Request(request) => request,
        other => return Err(out_of_turn(&other)),
    };
    limit(inbox, Some(PATIENCE))?;
    Ok(request)
}

fn answer(
    agent: &Agent,
    peer: Peer,
    request: Request,
    mut inbox: Inbox,
    outbox: &Outbox,
) -> Result<(), Refusal> {
    let open_to_all = matches!(request, Request::Health | Request::Fork { .. });
    if peer == (Peer::Local { root: false }) && !open_to_all {
        return Err(Refusal {
            errno: libc::EPERM,
            text: "only root may ask the agent for this from inside the machine".into(),
        });
    }
    let say = |frame| outbox.send_if_heard(&frame);
    match request {
        Request::Exec(exec) => {
            limit(&mut inbox, None)?;
            exec::run(agent, &exec, inbox, outbox)?;
        }
        Request::Put { path, mode, length } => {
            files::put(&path, mode, length, &mut inbox, outbox)?;
        }
        Request::Get { path } => files::get(&path, outbox)?,
        Request::Identify(identity) => match agent.identities().identify(&identity) {
            Ok(identified) => say(AgentFrame::Identified(identified)),
            Err(error) => return Err(of_error(error.errno(), &error)),
        },
        Request::Health => say(AgentFrame::Healthy(health(agent)?)),
        Request::AfterFork => match agent.identities().after_fork() {
            Ok(ran) => say(AgentFrame::HooksRan(ran)),
            Err(error) => return Err(of_error(libc::EIO, &error)),
        },
        Request::Fork { clones } => {
            limit(&mut inbox, None)?;
            forks::serve(
                agent,
                peer,
                clones,
                &mut inbox,
                outbox,
                forks::IDENTITY_LIMIT,
            )?;
        }
        Request::PowerOff => {
            if !agent.is_init() {
                return Err(Refusal {
                    errno: libc::ENOSYS,
                    text: "the agent is not this machine's PID 1: ask its init to power off".into(),
                });
            }
            // Said before: the machine may be gone at once.
            say(AgentFrame::PoweringOff);
            agent.end_machine(Last::PowerOff);
        }
    }
    Ok(())
}

fn health(agent: &Agent) -> Result<Healthy, Refusal> {
    let uptime = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let who = agent.doorbell().who();
    // In a clone it is the parent's until the clone is told its own.
    let known = agent
        .identities()
        .current()
        .filter(|known| who.is_none_or(|who| who.generation == known.generation));
    Ok(Healthy {
        version: env!("CARGO_PKG_VERSION").into(),
        uptime_ms: uptime.tv_sec as u64 * 1000 + uptime.tv_nsec as u64 / 1_000_000,
        clock_source: clock_source(),
        generation: known.map(|known| known.generation),
        clone_id: known.map(|known| known.clone_id),
    })
}

/// The client's next frame; the session cannot go on without one.
pub(crate) fn next(inbox: &mut Inbox) -> Result<ClientFrame, Refusal> {
    match frame::read(inbox) {
        Ok(Some(frame)) => Ok(frame),
        Ok(None) => Err(Refusal {
            errno: libc::ECONNRESET,
            text: "the client went away".into(),
        }),
        Err(FrameError::Stream(error)) if error.kind() == std::io::ErrorKind::WouldBlock => {
            Err(Refusal {
                errno: libc::ETIMEDOUT,
                text: format!(
                    "the client took longer than {} s over what it has to say",
                    PATIENCE.as_secs()
                ),
            })
        }
        Err(error) => Err(of_error(libc::EPROTO, &error)),
    }
}

/// A frame that has no place here. Its bytes may be many and secret: only its kind is told.
pub(crate) fn out_of_turn(frame: &ClientFrame) -> Refusal {
    let kind = match frame {
        ClientFrame::Hello(_) => "Hello",
        ClientFrame::Request(_) => "Request",
        ClientFrame::Stdin(_) => "Stdin",
        ClientFrame::StdinEnd => "StdinEnd",
        ClientFrame::Signal(_) => "Signal",
        ClientFrame::Resize(_) => "Resize",
        ClientFrame::Data(_) => "Data",
        ClientFrame::Join => "Join",
        ClientFrame::End(_) => "End",
    };
    invalid(format!(
        "the client sent a frame {kind:?}, which has no place here"
    ))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;
    use std::path::PathBuf;
    use std::thread;

    use super::*;
    use crate::doorbell::Absent;
    use crate::identity::{Identities, LinuxSystem};

    #[test]
    fn a_client_that_says_its_request_byte_by_byte_is_not_waited_for_longer_than_a_silent_one() {
        let system = LinuxSystem::new(PathBuf::from("/nowhere"), PathBuf::from("/nowhere"));
        let identities = Identities::new(Box::new(system));
        let agent = Agent::new(Box::new(Absent::new("a test")), identities, None);
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let slow = thread::spawn(move || {
            // A frame that takes twenty seconds at this pace.
            let frame = frame::encode(&ClientFrame::Stdin(vec![0; 60][..].into())).unwrap();
            for byte in frame.chunks(1) {
                if ours.write_all(byte).is_err() {
                    return;
                }
                thread::sleep(Duration::from_millis(300));
            }
            panic!("heard to the end");
        });
        let stream = Arc::new(File::from(OwnedFd::from(theirs)));
        let outbox = Outbox::new(stream.clone());
        let mut inbox = Incoming::inbox(stream);
        let refused = begin(&agent, &mut inbox, &outbox, Duration::from_secs(1)).unwrap_err();
        assert_eq!(refused.errno, libc::ETIMEDOUT, "{refused:?}");
        outbox.close();
        slow.join().unwrap();
    }
}
