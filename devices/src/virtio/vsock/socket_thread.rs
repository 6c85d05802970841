//! The thread that waits on the sockets of a vsock device: for programs of the host that connect, and
//! for streams that can go on.
//!
//! It moves nothing by itself: what it sees it tells the device, under the device's lock, and then has
//! its queues served. That is the one place where it touches guest memory, and it does so only while
//! the machine is not to stand still (see [`Brake`](crate::Brake)). In a pause it goes on to read
//! sockets into the bounded buffers of the connections, which no state holds.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, Event, EventData, EventFlags};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use super::Vsock;
use super::host::Token;
use super::unix::UnixBackend;
use crate::virtio::MmioTransport;

/// A vsock device by Unix sockets, shared by its bus and its thread.
pub type UnixVsock = Arc<Mutex<MmioTransport<Vsock<UnixBackend>>>>;

/// What stands for the listener in the set, where tokens count up from 1.
const LISTENER: u64 = 0;

/// What stands for [`SocketThread::call`].
const CALL: u64 = u64::MAX;

/// Events that one wait fetches.
const EVENTS: usize = 64;

/// A running thread, named `vsock`. Dropping it ends it, which waits for a page of guest memory that the
/// thread may be waiting for; whoever drops it does not hold the device's lock.
#[derive(Debug)]
pub struct SocketThread {
    call: OwnedFd,
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl SocketThread {
    /// Starts to serve `device`. Programs of the host connect by `listener`, if there is one; its path
    /// is its owner's to remove.
    ///
    /// From now on guest memory may be written, so the machine's memory and state are in place. The
    /// thread ends before the memory goes. It fails without a backend (kind `InvalidInput`), and when
    /// the host gives no descriptor or no thread.
    pub fn start(device: UnixVsock, listener: Option<UnixListener>) -> io::Result<SocketThread> {
        let set = {
            let device = device.lock().unwrap_or_else(PoisonError::into_inner);
            let backend = device.model().backend().ok_or_else(no_backend)?;
            backend.set().clone()
        };
        let call = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        epoll::add(&set, &call, EventData::new_u64(CALL), EventFlags::IN)?;
        if let Some(listener) = &listener {
            listener.set_nonblocking(true)?;
            // Edge-triggered: a descriptor limit that keeps it from accepting must not keep it busy.
            let events = EventFlags::IN | EventFlags::ET;
            epoll::add(&set, listener, EventData::new_u64(LISTENER), events)?;
        }
        let end = Arc::new(AtomicBool::new(false));
        let waiter = Waiter {
            device,
            set,
            listener,
            end: end.clone(),
            said_unaccepted: false,
        };
        let thread = thread::Builder::new()
            .name("vsock".into())
            .spawn(move || waiter.run())?;
        Ok(SocketThread {
            call,
            end,
            thread: Some(thread),
        })
    }
}

fn no_backend() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidInput,
        "a vsock device without a backend has no sockets to wait on",
    )
}

impl Drop for SocketThread {
    fn drop(&mut self) {
        self.end.store(true, Ordering::SeqCst);
        if let Err(error) = rustix::io::write(self.call.as_fd(), &1u64.to_ne_bytes()) {
            tracing::error!(%error, "the vsock thread cannot be called to its end");
            return;
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the vsock thread panicked; its streams were dead since");
        }
    }
}

/// The thread's own part.
struct Waiter {
    device: UnixVsock,
    set: Arc<OwnedFd>,
    listener: Option<UnixListener>,
    end: Arc<AtomicBool>,
    /// A connection could not be accepted before; that was said once.
    said_unaccepted: bool,
}

impl Waiter {
    fn run(mut self) {
        let mut events = Vec::with_capacity(EVENTS);
        while !self.end.load(Ordering::SeqCst) {
            events.clear();
            match epoll::wait(&self.set, spare_capacity(&mut events), None) {
                Ok(_) => self.serve(&events),
                Err(Errno::INTR) => {}
                Err(error) => {
                    tracing::error!(%error, "the vsock thread cannot wait and ends");
                    return;
                }
            }
        }
    }

    fn serve(&mut self, events: &[Event]) {
        let device = self.device.clone();
        let mut device = device.lock().unwrap_or_else(PoisonError::into_inner);
        for event in events {
            match { event.data }.u64() {
                LISTENER | CALL => {}
                token => {
                    let gone = EventFlags::HUP | EventFlags::ERR;
                    let hung_up = { event.flags }.intersects(gone);
                    device.model_mut().ready(Token(token), hung_up);
                }
            }
        }
        // At each turn, not only when the listener calls: what could not be accepted at its call may
        // be now.
        self.accept(device.model_mut());
        device.serve_from_outside();
    }

    fn accept(&mut self, model: &mut Vsock<UnixBackend>) {
        let Some(listener) = &self.listener else {
            return;
        };
        loop {
            let accepted = listener.accept().and_then(|(stream, _)| {
                let token = model.new_token();
                let backend = model.backend().ok_or_else(no_backend)?;
                Ok((token, backend.adopt(stream, token)?))
            });
            match accepted {
                Ok((token, stream)) => model.admit(token, stream),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // The peer has given up already: the next one is waiting.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    if !std::mem::replace(&mut self.said_unaccepted, true) {
                        tracing::warn!(%error, "a vsock connection cannot be accepted; it is said once");
                    }
                    return;
                }
            }
        }
    }
}
