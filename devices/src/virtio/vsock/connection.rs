//! One connection between a port of the guest and one of the host: what has arrived from either
//! side, how much each may still send, and what the guest is to be told next.
//!
//! Flow control is by credit (virtio 1.2 section 5.10.6.3). Each side says how many bytes it can
//! buffer and how many have left that buffer; what was sent and has not left may not be more. Towards
//! the guest that bounds what is sent; from the guest it bounds [`TO_HOST`]. A host that does not read
//! thus stops the guest's sender by credit, and a guest that does not read stops the host's sender by
//! a full socket. Nothing waits.
//!
//! A connection knows no queue and no other connection; the [`Muxer`](super::muxer::Muxer) calls it.

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::num::Wrapping;

use super::host::{HostStream, Token};
use super::packet::{Header, shutdown};

/// Most bytes from the guest that wait for the host: the credit that the guest is given.
pub(super) const TO_HOST: usize = 64 * 1024;

/// Most bytes from the host that wait for the guest. More stays in the host's socket.
pub(super) const TO_GUEST: usize = 64 * 1024;

/// How much of the guest's credit may be back without its being told.
const UNTOLD: u32 = TO_HOST as u32 / 2;

/// Bytes that one read of a stream takes at most.
pub(super) const READ_LEN: usize = 16 * 1024;

/// What the guest is to be told next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    Request,
    Response,
    Payload,
    CreditUpdate,
    CreditRequest,
    /// With these flags.
    Shutdown(u32),
    /// The connection is over once this is sent.
    Reset,
}

/// What a packet of the guest does to its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    GoesOn,
    /// Neither side sends any more. What the host has not read yet is still delivered.
    Finished,
    /// No well-behaved guest sends this now.
    Violation,
}

/// See the module's text.
pub(super) struct Connection<S> {
    pub(super) token: Token,
    outlet: Outlet<S>,
    /// The guest has not accepted it yet.
    asking: bool,
    /// The guest was asked.
    asked: bool,
    /// The guest asked, and was not answered.
    owes_response: bool,
    owes_credit: bool,
    /// Credit was asked for since there was some.
    wants_credit: bool,
    credit: Credit,
    to_guest: VecDeque<u8>,
    /// The stream may have something to read.
    readable: bool,
    /// The host sends no more.
    host_ended: bool,
    /// The host neither sends nor receives any more.
    hung_up: bool,
    /// Flags of [`shutdown`] that the guest has sent, and that it was sent.
    guest_ended: u32,
    told_ended: u32,
    /// It stands in the muxer's list of those that have something for the guest.
    pub(super) listed: bool,
}

impl<S: HostStream> Connection<S> {
    /// One that the host asks for.
    pub(super) fn asking(token: Token, stream: S) -> Connection<S> {
        Connection {
            token,
            outlet: Outlet::new(stream),
            asking: true,
            asked: false,
            owes_response: false,
            owes_credit: false,
            wants_credit: false,
            credit: Credit::default(),
            to_guest: VecDeque::new(),
            readable: true,
            host_ended: false,
            hung_up: false,
            guest_ended: 0,
            told_ended: 0,
            listed: false,
        }
    }

    /// One that the guest asked for, connected on the host.
    pub(super) fn accepted(token: Token, stream: S) -> Connection<S> {
        Connection {
            asking: false,
            owes_response: true,
            ..Connection::asking(token, stream)
        }
    }

    /// What the guest is to be told next, if anything.
    pub(super) fn next(&self) -> Option<Next> {
        if self.asking {
            return match (self.asked, self.hung_up) {
                (false, _) => Some(Next::Request),
                (true, true) => Some(Next::Reset),
                (true, false) => None,
            };
        }
        if self.owes_response {
            return Some(Next::Response);
        }
        if self.owes_credit || self.credit.untold() >= UNTOLD {
            return Some(Next::CreditUpdate);
        }
        if !self.to_guest.is_empty() {
            if self.credit.room_at_guest() > 0 {
                return Some(Next::Payload);
            }
            if !self.wants_credit {
                return Some(Next::CreditRequest);
            }
        }
        let ended = self.ended();
        (ended & !self.told_ended != 0).then_some(Next::Shutdown(ended))
    }

    /// Payload for a packet with room for `room` bytes of it.
    pub(super) fn payload(&self, room: usize) -> &[u8] {
        let (first, _) = self.to_guest.as_slices();
        let most = room.min(self.credit.room_at_guest() as usize);
        &first[..first.len().min(most)]
    }

    /// The credit that every packet to the guest carries: `buf_alloc` and `fwd_cnt`.
    pub(super) fn credit(&self) -> (u32, u32) {
        (TO_HOST as u32, self.credit.forwarded.0)
    }

    /// The guest was sent `next`, with `len` bytes of payload.
    pub(super) fn sent(&mut self, next: Next, len: usize, scratch: &mut [u8]) {
        self.credit.told = self.credit.forwarded;
        self.owes_credit = false;
        match next {
            Next::Request => self.asked = true,
            Next::Response => self.owes_response = false,
            Next::CreditRequest => self.wants_credit = true,
            Next::Shutdown(flags) => self.told_ended |= flags,
            Next::Payload => {
                self.to_guest.drain(..len);
                self.credit.sent += len as u32;
                self.fill(scratch);
            }
            Next::CreditUpdate | Next::Reset => {}
        }
    }

    /// The stream may go on, or has been hung up.
    pub(super) fn ready(&mut self, hung_up: bool, scratch: &mut [u8]) {
        self.readable = true;
        self.hung_up |= hung_up;
        self.outlet.writable = true;
        self.flush();
        self.fill(scratch);
    }

    /// Every packet of the guest tells its credit.
    pub(super) fn hear_credit(&mut self, header: &Header) {
        self.credit.guest_alloc = header.buf_alloc;
        self.credit.guest_forwarded = Wrapping(header.fwd_cnt);
        if self.credit.room_at_guest() > 0 {
            self.wants_credit = false;
        }
    }

    /// The guest accepts it. The host is told `port`, its own one.
    pub(super) fn on_response(&mut self, port: u32, scratch: &mut [u8]) -> Outcome {
        if !(self.asking && self.asked) {
            return Outcome::Violation;
        }
        self.asking = false;
        self.outlet.greet(format!("OK {port}\n").as_bytes());
        self.flush();
        self.fill(scratch);
        Outcome::GoesOn
    }

    pub(super) fn on_payload(&mut self, payload: &[u8]) -> Outcome {
        let fits = self.outlet.payload_len() + payload.len() <= TO_HOST;
        if self.asking || !fits || self.guest_ended & shutdown::SEND != 0 {
            return Outcome::Violation;
        }
        self.outlet.push(payload);
        self.flush();
        Outcome::GoesOn
    }

    pub(super) fn on_shutdown(&mut self, flags: u32) -> Outcome {
        if self.asking {
            return Outcome::Violation;
        }
        self.guest_ended |= flags & shutdown::BOTH;
        if flags & shutdown::RECEIVE != 0 {
            self.to_guest.clear();
            self.outlet.shut(Shutdown::Read);
        }
        if self.guest_ended & shutdown::SEND != 0 {
            self.outlet.end();
            self.flush();
        }
        if self.guest_ended == shutdown::BOTH {
            Outcome::Finished
        } else {
            Outcome::GoesOn
        }
    }

    pub(super) fn on_credit_request(&mut self) -> Outcome {
        self.owes_credit = true;
        Outcome::GoesOn
    }

    /// Whether only the guest's word is missing: it was told that the host does nothing any more.
    pub(super) fn is_over(&self) -> bool {
        self.told_ended == shutdown::BOTH
    }

    /// What the host is still to get, when the guest needs the connection no more.
    pub(super) fn into_outlet(self) -> Outlet<S> {
        self.outlet
    }

    /// Whether the buffers are within their bounds.
    #[cfg(test)]
    pub(super) fn is_bounded(&self) -> bool {
        self.to_guest.len() <= TO_GUEST && self.outlet.payload_len() <= TO_HOST
    }

    /// Writes what the stream takes.
    fn flush(&mut self) {
        self.credit.forwarded += self.outlet.flush() as u32;
        self.hung_up |= self.outlet.failed;
    }

    /// Reads what the buffer has room for.
    fn fill(&mut self, scratch: &mut [u8]) {
        while self.readable
            && !self.asking
            && !self.host_ended
            && self.guest_ended & shutdown::RECEIVE == 0
            && self.to_guest.len() < TO_GUEST
        {
            let room = scratch.len().min(TO_GUEST - self.to_guest.len());
            match self.outlet.stream.read(&mut scratch[..room]) {
                Ok(0) => self.host_ended = true,
                Ok(len) => self.to_guest.extend(&scratch[..len]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
                Err(_) => {
                    // What was read before is still the guest's.
                    self.host_ended = true;
                    self.hung_up = true;
                }
            }
        }
    }

    /// Flags of [`shutdown`] that hold for the host.
    fn ended(&self) -> u32 {
        let nobody_reads = self.guest_ended & shutdown::RECEIVE != 0;
        let sends_no_more =
            self.to_guest.is_empty() && (self.host_ended || self.hung_up && nobody_reads);
        let mut flags = 0;
        if sends_no_more {
            flags |= shutdown::SEND;
        }
        if self.hung_up {
            flags |= shutdown::RECEIVE;
        }
        flags
    }
}

/// Both sides' credit. Counters are modulo 2^32, as the specification has them.
#[derive(Default)]
struct Credit {
    /// Bytes from the guest that have left the buffer, and how many of them it was told of.
    forwarded: Wrapping<u32>,
    told: Wrapping<u32>,
    /// Bytes sent to the guest, and what it said of its buffer.
    sent: Wrapping<u32>,
    guest_alloc: u32,
    guest_forwarded: Wrapping<u32>,
}

impl Credit {
    /// Bytes that the guest can take now. None when it claims to have had more than it was sent.
    fn room_at_guest(&self) -> u32 {
        let under_way = (self.sent - self.guest_forwarded).0;
        self.guest_alloc.saturating_sub(under_way)
    }

    fn untold(&self) -> u32 {
        (self.forwarded - self.told).0
    }
}

/// The way to the host: a stream, and the bytes that it has not taken yet.
pub(super) struct Outlet<S> {
    stream: S,
    waiting: VecDeque<u8>,
    /// How many of the first ones are the greeting's answer, not the guest's.
    greeting: usize,
    /// The stream may take something.
    writable: bool,
    /// The host receives no more.
    failed: bool,
    /// Nothing comes after what waits.
    end: bool,
    end_done: bool,
}

impl<S: HostStream> Outlet<S> {
    fn new(stream: S) -> Outlet<S> {
        Outlet {
            stream,
            waiting: VecDeque::new(),
            greeting: 0,
            writable: true,
            failed: false,
            end: false,
            end_done: false,
        }
    }

    /// Whether the stream has all that it is ever to get.
    pub(super) fn is_done(&self) -> bool {
        self.waiting.is_empty()
    }

    /// The stream may go on; writes what it takes.
    pub(super) fn ready(&mut self) {
        self.writable = true;
        self.flush();
    }

    /// The guest's bytes that wait.
    fn payload_len(&self) -> usize {
        self.waiting.len() - self.greeting
    }

    fn greet(&mut self, answer: &[u8]) {
        self.greeting = answer.len();
        self.waiting.extend(answer);
    }

    fn push(&mut self, payload: &[u8]) {
        self.waiting.extend(payload);
    }

    fn end(&mut self) {
        self.end = true;
    }

    fn shut(&mut self, how: Shutdown) {
        if let Err(error) = self.stream.shutdown(how) {
            // Its peer has gone already.
            tracing::trace!(%error, ?how, "vsock: a host's stream is over");
        }
    }

    /// Writes what the stream takes, and returns how many of the guest's bytes have gone. A host that
    /// receives no more gets rid of all of them.
    fn flush(&mut self) -> usize {
        let before = self.payload_len();
        while self.writable && !self.failed && !self.waiting.is_empty() {
            let (first, _) = self.waiting.as_slices();
            match self.stream.write(first) {
                Ok(0) => self.failed = true,
                Ok(len) => {
                    self.waiting.drain(..len);
                    self.greeting = self.greeting.saturating_sub(len);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.writable = false,
                Err(_) => self.failed = true,
            }
        }
        if self.failed {
            self.waiting.clear();
            self.greeting = 0;
        }
        if self.end && self.waiting.is_empty() && !self.end_done {
            self.end_done = true;
            self.shut(Shutdown::Write);
        }
        before - self.payload_len()
    }
}
