//! Listens on a machine's control socket, and serves those who connect: one thread accepts, one serves each.
//!
//! Only the user that the machine belongs to is served: the socket is his alone, and so is its directory; who
//! is at the other end is asked of the kernel (SO_PEERCRED) all the same. What a client sends, or leaves out,
//! is its own affair: it can disturb neither the VMs nor other clients, but for what it may ask of them.

use std::collections::HashMap;
use std::fs::{self, Permissions};
use std::io;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use forkvm::engine::Family;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use rustix::process::geteuid;
use serde_json::Value;

use super::bell::Bell;
use super::lines::{LineError, Lines};
use super::protocol::{self, Failure, Kind, LONGEST_REQUEST, Request};
use super::registry::Registry;
use super::taps::Taps;
use super::{requests, stream};

/// Clients at a time.
const CLIENTS: usize = 32;

/// How long the end of the machine waits for clients to take what was still to be answered.
const FAREWELL: Duration = Duration::from_secs(2);

/// What clients can ask about.
pub(crate) struct Machine {
    pub(crate) family: Arc<Family>,
    pub(crate) vms: Arc<Registry>,
    pub(crate) taps: Arc<Taps>,
}

/// Serves as long as it is there. When it is dropped, answers that are due are still given.
pub(crate) struct Server {
    shared: Arc<Shared>,
    stop: Arc<Bell>,
    accepting: Option<JoinHandle<()>>,
}

struct Shared {
    machine: Machine,
    clients: Mutex<Clients>,
    /// Signalled when a client has its answer, or has gone.
    served: Condvar,
}

#[derive(Default)]
struct Clients {
    /// To be hung up on, by a number of their own.
    streams: HashMap<u64, UnixStream>,
    last: u64,
    /// Requests that have no answer yet.
    unanswered: u32,
}

impl Server {
    /// Listens at `path`, where nothing is.
    pub(crate) fn start(path: &Path, machine: Machine) -> io::Result<Server> {
        let listener = UnixListener::bind(path)?;
        fs::set_permissions(path, Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        let shared = Arc::new(Shared {
            machine,
            clients: Mutex::default(),
            served: Condvar::new(),
        });
        let stop = Arc::new(Bell::new()?);
        let accept = {
            let (shared, stop) = (shared.clone(), stop.clone());
            move || accept(&listener, &stop, &shared)
        };
        let accepting = thread::Builder::new()
            .name("control".into())
            .spawn(accept)?;
        Ok(Server {
            shared,
            stop,
            accepting: Some(accepting),
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.ring();
        if let Some(Err(_panic)) = self.accepting.take().map(JoinHandle::join) {
            tracing::error!("the thread that accepts clients panicked");
        }
        let clients = self.shared.lock();
        let due = |clients: &mut Clients| clients.unanswered > 0;
        let waited = self
            .shared
            .served
            .wait_timeout_while(clients, FAREWELL, due);
        let clients = waited.unwrap_or_else(PoisonError::into_inner).0;
        for stream in clients.streams.values() {
            hang_up(stream);
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Clients> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn accept(listener: &UnixListener, stop: &Bell, shared: &Arc<Shared>) {
    loop {
        let mut fds = [
            PollFd::new(listener, PollFlags::IN),
            PollFd::new(stop, PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) if !fds[1].revents().is_empty() => return,
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => {
                tracing::error!(%error, "nobody is served on the control socket any more");
                return;
            }
        }
        let welcomed = match listener.accept() {
            Ok((stream, _)) => welcome(stream, shared),
            Err(error) => Err(error),
        };
        match welcomed {
            Ok(()) => {}
            // It was another one's turn, or the client has gone.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock
                        | io::ErrorKind::Interrupted
                        | io::ErrorKind::ConnectionAborted
                        | io::ErrorKind::BrokenPipe
                ) => {}
            Err(error) => {
                tracing::warn!(%error, "a client of the control socket could not be served");
                // Without descriptors or threads the same would happen at once again.
                thread::sleep(Duration::from_millis(50));
            }
        }
    }
}

/// Serves a client in a thread of its own, or tells it why not.
fn welcome(stream: UnixStream, shared: &Arc<Shared>) -> io::Result<()> {
    // An accepted socket does not inherit it on Linux; to be read and written by a thread that may wait.
    stream.set_nonblocking(false)?;
    if let Err(failure) = admit(&stream, shared) {
        return Lines::new(stream, 0).send(&line(&Err(failure))?);
    }
    let number = {
        let mut clients = shared.lock();
        clients.last += 1;
        let number = clients.last;
        clients.streams.insert(number, stream.try_clone()?);
        number
    };
    let client = Client {
        shared: shared.clone(),
        number,
    };
    thread::Builder::new()
        .name(format!("client-{number}"))
        .spawn(move || client.serve(stream))?;
    Ok(())
}

fn admit(stream: &UnixStream, shared: &Shared) -> Result<(), Failure> {
    let peer = socket_peercred(stream.as_fd());
    let peer = peer.map_err(|error| Failure::new(Kind::Refused, error.to_string()))?;
    if peer.uid != geteuid() {
        let text = "only the user that the machine belongs to may ask it anything";
        return Err(Failure::new(Kind::Refused, text));
    }
    if shared.lock().streams.len() >= CLIENTS {
        let text = format!("{CLIENTS} clients are connected already: let one of them end");
        return Err(Failure::new(Kind::Refused, text));
    }
    Ok(())
}

fn line(outcome: &Result<Value, Failure>) -> io::Result<Vec<u8>> {
    Ok(protocol::to_line(&protocol::answer(outcome))?)
}

fn hang_up(stream: &UnixStream) {
    match stream.shutdown(Shutdown::Both) {
        Ok(()) => {}
        Err(error) => tracing::debug!(%error, "a client had hung up already"),
    }
}

/// One that is served. Forgotten when it is dropped.
struct Client {
    shared: Arc<Shared>,
    number: u64,
}

impl Drop for Client {
    fn drop(&mut self) {
        self.shared.lock().streams.remove(&self.number);
        self.shared.served.notify_all();
    }
}

/// A request that has no answer yet.
struct Unanswered<'a>(&'a Shared);

impl<'a> Unanswered<'a> {
    fn begin(shared: &'a Shared) -> Unanswered<'a> {
        shared.lock().unanswered += 1;
        Unanswered(shared)
    }
}

impl Drop for Unanswered<'_> {
    fn drop(&mut self) {
        self.0.lock().unanswered -= 1;
        self.0.served.notify_all();
    }
}

impl Client {
    fn serve(self, stream: UnixStream) {
        if let Err(error) = self.answer_all(Lines::new(stream, LONGEST_REQUEST)) {
            tracing::debug!(%error, client = self.number, "a client went in the middle");
        }
    }

    fn answer_all(&self, mut lines: Lines) -> io::Result<()> {
        let machine = &self.shared.machine;
        loop {
            let text = match lines.next() {
                Ok(Some(text)) => text,
                Ok(None) => return Ok(()),
                // Where the next line begins is not known.
                Err(error @ LineError::TooLong(_)) => {
                    return lines.send(&line(&Err(Failure::usage(error.to_string())))?);
                }
                Err(LineError::Read(error)) => return Err(error),
            };
            let _unanswered = Unanswered::begin(&self.shared);
            let outcome = match protocol::from_line(&text) {
                Ok(Request::Console { vm }) => match stream::open(machine, &vm)? {
                    Ok(console) => {
                        lines.send(&line(&Ok(Value::Object(Default::default())))?)?;
                        return console.serve(lines);
                    }
                    Err(failure) => Err(failure),
                },
                Ok(Request::Wait { vm }) => match requests::wait(machine, &vm, lines.stream())? {
                    Some(outcome) => outcome,
                    None => return Ok(()),
                },
                Ok(request) => requests::answer(machine, request),
                Err(failure) => Err(failure),
            };
            lines.send(&line(&outcome)?)?;
        }
    }
}
