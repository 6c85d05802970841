//! What a vsock device needs of the host: streams, and somebody who connects them.
//!
//! [`unix`](super::unix) is the implementation with Unix sockets; tests have streams in memory. None
//! of these calls may block: they are made by vCPUs, with the device locked.

use std::io;
use std::net::Shutdown;

/// One end of a stream of bytes on the host.
pub trait HostStream: Send {
    /// Reads what is there into `data`; 0 when the peer sends no more,
    /// [`WouldBlock`](io::ErrorKind::WouldBlock) when nothing is there now. `data` is not empty.
    fn read(&mut self, data: &mut [u8]) -> io::Result<usize>;

    /// Writes some of `data`, which is not empty, and says how much;
    /// [`WouldBlock`](io::ErrorKind::WouldBlock) when the peer has to read first.
    fn write(&mut self, data: &[u8]) -> io::Result<usize>;

    /// Ends one or both directions, as seen from here.
    fn shutdown(&mut self, how: Shutdown) -> io::Result<()>;
}

/// Connects a guest to what listens on its host.
pub trait Backend: Send {
    /// What it connects to.
    type Stream: HostStream;

    /// Connects to what listens on `port`, or fails at once. Whoever owns the backend calls
    /// [`Vsock::ready`](super::Vsock::ready) with `token` when the stream could not go on before and
    /// now may.
    fn connect(&mut self, port: u32, token: Token) -> io::Result<Self::Stream>;
}

/// Names a stream of a device, for as long as the device lives: none is used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Token(pub(super) u64);
