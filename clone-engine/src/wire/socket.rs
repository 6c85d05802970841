//! A Unix socket that carries messages and descriptors.
//!
//! SOCK_SEQPACKET: a message arrives whole or not at all, so a process that dies in the middle of one
//! leaves nothing half-read. A message is CBOR of at most [`MOST_BYTES`]; what may be longer goes in a
//! memfd beside it. The kernel passes at most [`MOST_FILES`] descriptors with one message: more go
//! ahead, in messages without a body.

use std::fmt;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown, SocketFlags, SocketType,
    sockopt,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

/// Longest message.
const MOST_BYTES: usize = 64 * 1024;

/// Most descriptors of one message (SCM_MAX_FD is 253).
const MOST_FILES: usize = 250;

/// First byte of a message: descriptors of the message that follows.
const AHEAD: u8 = 0;
/// First byte of a message: its body follows.
const WHOLE: u8 = 1;

/// One end. Any thread may send; one receives.
pub(crate) struct Socket {
    fd: OwnedFd,
    /// Held while a message and the descriptors ahead of it are sent.
    sending: Mutex<()>,
    /// Where a message is received.
    buffer: Mutex<Box<[u8]>>,
}

impl fmt::Debug for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Socket({:?})", self.fd)
    }
}

/// What arrived, and the descriptors with it; [`SocketError::Cut`] if this process had no room for all.
pub(crate) type Received<T> = (T, Result<Vec<OwnedFd>, SocketError>);

impl Socket {
    /// Both ends of a new one. Neither is inherited by a program that is executed.
    pub(crate) fn pair() -> io::Result<(Socket, OwnedFd)> {
        let (near, far) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        Ok((Socket::from(near), far))
    }

    /// An end that was inherited.
    pub(crate) fn inherited(fd: OwnedFd) -> Result<Socket, SocketError> {
        match sockopt::socket_type(&fd) {
            Ok(SocketType::SEQPACKET) => Ok(Socket::from(fd)),
            Ok(_) | Err(_) => Err(SocketError::NoSocket),
        }
    }

    /// Sends `message` with `files`. Waits while the other end has much to read. What cannot be sent
    /// leaves the socket closed: the other end would wait for it, or take its descriptors for others'.
    pub(crate) fn send<T: Serialize>(
        &self,
        message: &T,
        files: &[BorrowedFd<'_>],
    ) -> Result<(), SocketError> {
        let mut bytes = vec![WHOLE];
        ciborium::into_writer(message, &mut bytes)
            .map_err(|error| SocketError::Encode(error.to_string()))?;
        if bytes.len() > MOST_BYTES {
            return Err(SocketError::TooLong { len: bytes.len() });
        }
        let _one_at_a_time = self.sending.lock().unwrap_or_else(PoisonError::into_inner);
        let mut files = files;
        while files.len() > MOST_FILES {
            let (ahead, rest) = files.split_at(MOST_FILES);
            self.send_raw(&[AHEAD], ahead)
                .inspect_err(|_half_sent| self.close())?;
            files = rest;
        }
        self.send_raw(&bytes, files)
            .inspect_err(|_not_sent| self.close())
    }

    fn send_raw(&self, bytes: &[u8], files: &[BorrowedFd<'_>]) -> Result<(), SocketError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FILES))];
        loop {
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            if !files.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(files)) {
                unreachable!("there is room for MOST_FILES");
            }
            let body = [IoSlice::new(bytes)];
            match rustix::net::sendmsg(&self.fd, &body, &mut ancillary, SendFlags::NOSIGNAL) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(SocketError::Closed),
                Err(Errno::AGAIN) => return Err(SocketError::Silent),
                Err(error) => return Err(SocketError::Io(error.into())),
            }
        }
    }

    /// The next message. [`SocketError::Closed`] when the other end has gone.
    pub(crate) fn receive<T: DeserializeOwned>(&self) -> Result<Received<T>, SocketError> {
        let mut buffer = self.buffer.lock().unwrap_or_else(PoisonError::into_inner);
        let mut files = Ok(Vec::new());
        let mut half_received = false;
        loop {
            let len = match self.receive_raw(&mut buffer, &mut files) {
                // Its descriptors are here already.
                Err(SocketError::Silent) if half_received => continue,
                received => received?,
            };
            match buffer[..len].split_first() {
                None => return Err(SocketError::Closed),
                Some((&AHEAD, [])) => half_received = true,
                Some((&WHOLE, body)) => {
                    let message = ciborium::from_reader(body)
                        .map_err(|error| SocketError::Decode(error.to_string()))?;
                    return Ok((message, files));
                }
                Some(_) => return Err(SocketError::Decode("an unknown first byte".into())),
            }
        }
    }

    fn receive_raw(
        &self,
        buffer: &mut [u8],
        files: &mut Result<Vec<OwnedFd>, SocketError>,
    ) -> Result<usize, SocketError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FILES))];
        loop {
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let mut body = [IoSliceMut::new(buffer)];
            let flags = RecvFlags::CMSG_CLOEXEC;
            let received = match rustix::net::recvmsg(&self.fd, &mut body, &mut ancillary, flags) {
                Ok(received) => received,
                // The other end went without having read all: what it had sent before comes all the same.
                Err(Errno::INTR | Errno::CONNRESET) => continue,
                Err(Errno::AGAIN) => return Err(SocketError::Silent),
                Err(error) => return Err(SocketError::Io(error.into())),
            };
            for message in ancillary.drain() {
                if let (RecvAncillaryMessage::ScmRights(fds), Ok(files)) = (message, &mut *files) {
                    files.extend(fds);
                }
            }
            // Descriptors are cut off where this process has no room for more of them. That is for whoever
            // needs them to suffer.
            if received.flags.contains(ReturnFlags::CTRUNC) {
                *files = Err(SocketError::Cut);
            }
            if received.flags.contains(ReturnFlags::TRUNC) {
                return Err(SocketError::Decode("it is longer than any may be".into()));
            }
            return Ok(received.bytes);
        }
    }

    /// Has [`receive`](Socket::receive) give up after `limit`; `None` for never.
    pub(crate) fn receive_within(&self, limit: Option<Duration>) -> io::Result<()> {
        Ok(sockopt::set_socket_timeout(
            &self.fd,
            sockopt::Timeout::Recv,
            limit,
        )?)
    }

    /// Has [`send`](Socket::send) give up when the other end makes no room for `limit`; `None` for never.
    pub(crate) fn send_within(&self, limit: Option<Duration>) -> io::Result<()> {
        Ok(sockopt::set_socket_timeout(
            &self.fd,
            sockopt::Timeout::Send,
            limit,
        )?)
    }

    /// Closes both directions: the other end finds it closed, and so does who receives here.
    pub(crate) fn close(&self) {
        if let Err(error) = rustix::net::shutdown(&self.fd, Shutdown::Both) {
            tracing::trace!(%error, "a socket was closed before");
        }
    }
}

impl From<OwnedFd> for Socket {
    fn from(fd: OwnedFd) -> Socket {
        Socket {
            fd,
            sending: Mutex::new(()),
            buffer: Mutex::new(vec![0; MOST_BYTES].into_boxed_slice()),
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Why nothing could be sent or received.
#[derive(Debug, Error)]
pub enum SocketError {
    /// The other end has gone.
    #[error("the other end of the socket has gone")]
    Closed,
    /// Nothing came in time, or nothing was taken.
    #[error("the other end of the socket is silent")]
    Silent,
    /// Not such a socket.
    #[error(
        "this is no socket of an engine: a worker is started by the process whose clones it runs, \
         never by hand"
    )]
    NoSocket,
    /// The message is longer than any may be.
    #[error("a message has {len} bytes, at most {MOST_BYTES} are allowed")]
    TooLong {
        /// Its length.
        len: usize,
    },
    /// A message came without all its descriptors.
    #[error("a message came without all its file descriptors: raise `ulimit -n`")]
    Cut,
    /// It could not be encoded.
    #[error("a message could not be encoded: {0}")]
    Encode(String),
    /// It could not be decoded.
    #[error("a message could not be decoded: {0}; both ends must be of one build")]
    Decode(String),
    /// The kernel refused.
    #[error("the socket failed")]
    Io(#[source] io::Error),
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Seek, Write};

    use super::*;

    fn pair() -> (Socket, Socket) {
        let (near, far) = Socket::pair().unwrap();
        (near, Socket::inherited(far).unwrap())
    }

    #[test]
    fn a_message_arrives_with_its_descriptors_in_order_however_many() {
        /// More than one message of the kernel carries, and twice that below the 1024 that a process may usually have open.
        const MANY: u32 = 400;
        let (near, far) = pair();
        let files: Vec<File> = (0..MANY)
            .map(|number| {
                let mut file = tempfile::tempfile().unwrap();
                file.write_all(&number.to_le_bytes()).unwrap();
                file
            })
            .collect();
        let borrowed: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
        near.send(&"many", &borrowed).unwrap();
        near.send(&"none", &[]).unwrap();
        let (text, arrived): Received<String> = far.receive().unwrap();
        let arrived = arrived.unwrap();
        assert_eq!((text.as_str(), arrived.len()), ("many", MANY as usize));
        for (number, fd) in (0..MANY).zip(arrived) {
            let mut file = File::from(fd);
            let mut bytes = [0; 4];
            file.rewind().unwrap();
            file.read_exact(&mut bytes).unwrap();
            assert_eq!(u32::from_le_bytes(bytes), number);
        }
        let (text, arrived): Received<String> = far.receive().unwrap();
        assert_eq!((text.as_str(), arrived.unwrap().len()), ("none", 0));
    }

    #[test]
    fn an_end_that_goes_is_noticed_by_both_directions() {
        let (near, far) = pair();
        near.send(&1u32, &[]).unwrap();
        drop(near);
        let (number, _): Received<u32> = far.receive().unwrap();
        assert_eq!(number, 1, "what was sent before arrives");
        assert!(matches!(far.receive::<u32>(), Err(SocketError::Closed)));
        assert!(matches!(far.send(&2u32, &[]), Err(SocketError::Closed)));
    }

    #[test]
    fn what_an_end_has_said_arrives_although_it_went_without_reading_what_it_was_told() {
        let (near, far) = pair();
        far.send(&"unread", &[]).unwrap();
        near.send(&1u32, &[]).unwrap();
        near.send(&2u32, &[]).unwrap();
        drop(near);
        for due in 1..=2u32 {
            let (number, _): Received<u32> = far.receive().unwrap();
            assert_eq!(number, due);
        }
        assert!(matches!(far.receive::<u32>(), Err(SocketError::Closed)));
    }

    #[test]
    fn a_message_that_is_too_long_or_of_another_kind_is_refused() {
        let (near, far) = pair();
        let long = "x".repeat(MOST_BYTES);
        assert!(matches!(
            near.send(&long, &[]),
            Err(SocketError::TooLong { .. })
        ));
        near.send(&"text", &[]).unwrap();
        assert!(matches!(far.receive::<u32>(), Err(SocketError::Decode(_))));
    }

    #[test]
    fn a_file_is_no_socket_of_an_engine() {
        let file = tempfile::tempfile().unwrap();
        let refused = Socket::inherited(file.into()).unwrap_err();
        assert!(matches!(refused, SocketError::NoSocket), "{refused}");
    }
}
