//! The host's side of a vsock device by Unix sockets, as Firecracker has it: what listens on port P of
//! the host is a Unix socket at `PREFIX_P`.
//!
//! All sockets are non-blocking and stand in one epoll(7) set, edge-triggered, from their first moment
//! to their last. So nothing has to be changed there when a buffer fills or empties, and a vCPU can
//! open a stream without the thread that waits on the set ([`SocketThread`](super::SocketThread)).

use std::ffi::OsString;
use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::net::{
    AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, send, socket_with,
};

use super::host::{Backend, HostStream, Token};

/// Connects a guest to Unix sockets.
#[derive(Debug)]
pub struct UnixBackend {
    /// All its streams are in it, each under its [`Token`]. Shared with the thread that waits on it.
    set: Arc<OwnedFd>,
    prefix: Option<PathBuf>,
}

impl UnixBackend {
    /// A guest's connect to port P goes to the Unix socket at `prefix` with `_P` behind it; without a
    /// prefix, nowhere. An error when the host gives no descriptor.
    pub fn new(prefix: Option<PathBuf>) -> io::Result<UnixBackend> {
        let set = epoll::create(CreateFlags::CLOEXEC)?;
        Ok(UnixBackend {
            set: Arc::new(set),
            prefix,
        })
    }

    /// What the sockets are waited for in.
    pub(super) fn set(&self) -> &Arc<OwnedFd> {
        &self.set
    }

    /// Makes a stream that somebody has opened one of this backend's.
    pub(super) fn adopt(&self, stream: UnixStream, token: Token) -> io::Result<UnixEnd> {
        stream.set_nonblocking(true)?;
        let events = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        epoll::add(&self.set, &stream, EventData::new_u64(token.0), events)?;
        Ok(UnixEnd(stream))
    }
}

impl Backend for UnixBackend {
    type Stream = UnixEnd;

    /// Fails, rather than waiting, where the listener's backlog is full.
    fn connect(&mut self, port: u32, token: Token) -> io::Result<UnixEnd> {
        let Some(prefix) = &self.prefix else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        let mut path = OsString::from(prefix);
        path.push(format!("_{port}"));
        let address = SocketAddrUnix::new(path)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        connect(&socket, &address)?;
        self.adopt(UnixStream::from(socket), token)
    }
}

/// A stream of a [`UnixBackend`]. Closing it takes it out of the backend's set.
#[derive(Debug)]
pub struct UnixEnd(UnixStream);

impl HostStream for UnixEnd {
    fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
        io::Read::read(&mut self.0, data)
    }

    /// Without SIGPIPE, which a program that embeds this may not ignore.
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        Ok(send(&self.0, data, SendFlags::NOSIGNAL)?)
    }

    fn shutdown(&mut self, how: Shutdown) -> io::Result<()> {
        self.0.shutdown(how)
    }
}
