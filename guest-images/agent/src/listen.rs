//! Who is let in: the host by vsock or a Unix socket of its own, programs of the guest by another one.
//!
//! A thread waits at each socket and starts one for each session, as many at a time as the socket has places: whoever is in
//! the guest can take those of programs, and the host gets in all the same.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use forkvm_agent_protocol::{AgentFrame, Refusal};
use rustix::net::sockopt::socket_peercred;
use thiserror::Error;

use crate::agent::Agent;
use crate::log;
use crate::options::{HostSocket, Options};
use crate::outbox::Outbox;
use crate::session::{self, Peer};
use crate::vsock::VsockListener;

/// Most sessions of the host at a time. A machine's vsock device has 128 streams.
const HOST_SESSIONS: usize = 96;

/// Most sessions of programs at a time.
const LOCAL_SESSIONS: usize = 32;

/// How long a socket that cannot accept is left alone.
const PAUSE: Duration = Duration::from_millis(200);

/// Listens for the host and, where the options say so, for programs of the guest.
///
/// # Errors
/// A socket that cannot be made. Without vsock in the kernel the agent serves programs of the guest alone.
pub fn start(agent: &Arc<Agent>, options: &Options) -> Result<(), ListenError> {
    if let Some(path) = &options.local {
        let listener = bind(path, 0o666)?;
        wait_at(agent, LOCAL_SESSIONS, move || {
            let (stream, _) = listener.accept()?;
            // Who cannot be told is nobody special.
            let root = socket_peercred(&stream).is_ok_and(|peer| peer.uid.is_root());
            Ok((OwnedFd::from(stream), Peer::Local { root }))
        })?;
    }
    match &options.host {
        HostSocket::Unix(path) => {
            let listener = bind(path, 0o600)?;
            wait_at(agent, HOST_SESSIONS, move || {
                let (stream, _) = listener.accept()?;
                Ok((OwnedFd::from(stream), Peer::Host))
            })
        }
        HostSocket::Vsock(port) => match VsockListener::bind(*port) {
            Ok(listener) => wait_at(agent, HOST_SESSIONS, move || {
                Ok((listener.accept()?, Peer::Host))
            }),
            Err(error) if options.local.is_some() => {
                log::line(&format!(
                    "the host cannot reach the agent: vsock port {port}: {error}"
                ));
                Ok(())
            }
            Err(source) => Err(ListenError::Vsock {
                port: *port,
                source,
            }),
        },
    }
}

/// A Unix socket at `path`, in place of what an agent before this one left there.
fn bind(path: &Path, mode: u32) -> Result<UnixListener, ListenError> {
    let fail = |source| ListenError::Unix {
        path: path.to_owned(),
        source,
    };
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(fail)?;
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(fail(error)),
        _ => {}
    }
    // Nobody may come in before the mode is set: it is made under another name.
    let unfinished = path.with_extension("new");
    match fs::remove_file(&unfinished) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(fail(error)),
        _ => {}
    }
    let listener = UnixListener::bind(&unfinished).map_err(fail)?;
    fs::set_permissions(&unfinished, Permissions::from_mode(mode)).map_err(fail)?;
    fs::rename(&unfinished, path).map_err(fail)?;
    Ok(listener)
}

/// Serves whoever `accept` lets in, each in a thread of its own, `most` of them at a time.
fn wait_at(
    agent: &Arc<Agent>,
    most: usize,
    accept: impl Fn() -> io::Result<(OwnedFd, Peer)> + Send + 'static,
) -> Result<(), ListenError> {
    let agent = agent.clone();
    let open = Arc::new(AtomicUsize::new(0));
    let wait = move || {
        let mut failing = false;
        loop {
            match accept() {
                Ok((stream, peer)) => {
                    failing = false;
                    let_in(&agent, stream, peer, Place::take(&open, most));
                }
                // A transport that was reset, or too many descriptors: it passes. Said once.
                Err(error) => {
                    if !failing {
                        log::line(&format!("waiting for clients: {error}"));
                    }
                    failing = true;
                    thread::sleep(PAUSE);
                }
            }
        }
    };
    thread::Builder::new()
        .name("listen".into())
        .spawn(wait)
        .map(drop)
        .map_err(ListenError::Thread)
}

/// One of the sessions that are counted.
struct Place {
    open: Arc<AtomicUsize>,
}

impl Place {
    fn take(open: &Arc<AtomicUsize>, most: usize) -> Option<Place> {
        let place = Place { open: open.clone() };
        // Given back by the drop, also where there was none.
        (open.fetch_add(1, Ordering::AcqRel) < most).then_some(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.open.fetch_sub(1, Ordering::AcqRel);
    }
}

fn let_in(agent: &Arc<Agent>, stream: OwnedFd, peer: Peer, place: Option<Place>) {
    let stream = Arc::new(File::from(stream));
    let Some(place) = place else {
        return turn_away(stream, libc::EAGAIN, "the agent has too many sessions");
    };
    let (agent, of_session) = (agent.clone(), stream.clone());
    let session = move || {
        session::serve(&agent, of_session, peer);
        drop(place);
    };
    let started = thread::Builder::new().name("session".into()).spawn(session);
    if let Err(error) = started {
        turn_away(
            stream,
            libc::EAGAIN,
            &format!("the agent has no thread for a session: {error}"),
        );
    }
}

fn turn_away(stream: Arc<File>, errno: i32, text: &str) {
    let outbox = Outbox::new(stream);
    outbox.send_if_heard(&AgentFrame::Refused(Refusal {
        errno,
        text: text.into(),
    }));
    outbox.close();
}

/// Why nobody can be let in.
#[derive(Debug, Error)]
pub enum ListenError {
    /// A Unix socket.
    #[error("listening on {}: {source}", path.display())]
    Unix {
        /// Its place.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Vsock.
    #[error(
        "listening on vsock port {port}: {source}; a machine without vsock is served by --unix PATH"
    )]
    Vsock {
        /// The port.
        port: u32,
        /// Why it failed.
        source: io::Error,
    },
    /// No thread.
    #[error("starting a thread of the agent: {0}")]
    Thread(io::Error),
}
