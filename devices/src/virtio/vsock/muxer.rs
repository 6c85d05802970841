//! All connections of a vsock device: which packet goes to which, and what the guest is sent next.
//!
//! A pure state machine. It has no thread, no queue and no descriptor of its own: streams are a
//! trait's, packets are handed in and taken out one at a time, and who tells it that a stream may go
//! on is its owner's concern. Whatever the guest sends, what it holds is bounded: connections by
//! [`MOST_CONNECTIONS`], bytes of each by the credit given, refusals by [`MOST_REFUSALS`], after which
//! it takes no packet until the guest has fetched some.

use std::collections::{BTreeMap, VecDeque};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;

use super::connection::{Connection, Next, Outcome, Outlet, READ_LEN};
use super::greeting::{Greeted, Greeting};
use super::host::{HostStream, Token};
use super::packet::{HEADER_LEN, HOST_CID, Header, TYPE_STREAM, op};

/// Most streams of a device, whatever they are at.
pub(super) const MOST_CONNECTIONS: usize = 128;

/// Refusals that may wait for the guest before no packet of it is taken any more.
pub(super) const MOST_REFUSALS: usize = 128;

/// First of the ports that the host's side of a connection gets, above all that anybody listens on.
const FIRST_HOST_PORT: u32 = 1 << 30;

/// Where the ports of a device begin. A guest that was cloned or restored may still be closing the streams of
/// the life before, and takes a new one that has both ports of such a one for a late word of it.
fn random_host_port() -> u32 {
    let random = RandomState::new().build_hasher().finish() as u32;
    FIRST_HOST_PORT + random % FIRST_HOST_PORT
}

/// What tells a connection from all others of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    host_port: u32,
    guest_port: u32,
}

/// See the module's text.
pub(super) struct Muxer<S> {
    guest_cid: u64,
    tokens_given: u64,
    next_host_port: u32,
    /// Streams whose first line is not complete.
    greetings: BTreeMap<Token, Greeting<S>>,
    connections: BTreeMap<Key, Connection<S>>,
    by_token: BTreeMap<Token, Key>,
    /// What the guest has sent over connections that it needs no more, on its way to the host.
    draining: BTreeMap<Token, Outlet<S>>,
    /// Answers to packets that belong to no connection.
    refusals: VecDeque<Header>,
    /// Connections that may have something for the guest, each once, in the order of their turns.
    turns: VecDeque<Key>,
    scratch: Vec<u8>,
}

impl<S: HostStream> Muxer<S> {
    pub(super) fn new(guest_cid: u64) -> Muxer<S> {
        Muxer {
            guest_cid,
            tokens_given: 0,
            next_host_port: random_host_port(),
            greetings: BTreeMap::new(),
            connections: BTreeMap::new(),
            by_token: BTreeMap::new(),
            draining: BTreeMap::new(),
            refusals: VecDeque::new(),
            turns: VecDeque::new(),
            scratch: Vec::new(),
        }
    }

    pub(super) fn guest_cid(&self) -> u64 {
        self.guest_cid
    }

    /// Another CID: whoever the guest was is not connected any more.
    pub(super) fn start_over(&mut self, guest_cid: u64) {
        *self = Muxer {
            // A token is never used twice: what is known of the old streams may still come in.
            tokens_given: self.tokens_given,
            next_host_port: self.next_host_port,
            ..Muxer::new(guest_cid)
        };
    }

    /// A token for a stream that is about to be given.
    pub(super) fn new_token(&mut self) -> Token {
        self.tokens_given += 1;
        Token(self.tokens_given)
    }

    /// Takes a stream from the host, which will say where it wants to. Where there is no room for it,
    /// it is closed.
    pub(super) fn admit(&mut self, token: Token, stream: S) {
        if self.make_room() {
            self.greetings.insert(token, Greeting::new(stream));
            self.ready(token, false);
        } else {
            tracing::debug!("vsock: a connection too many is closed");
        }
    }

    /// Stream `token` could not go on and now may, or its peer has hung up. Says nothing when there is
    /// no such stream any more.
    pub(super) fn ready(&mut self, token: Token, hung_up: bool) {
        if let Some(greeting) = self.greetings.remove(&token) {
            match greeting.go_on() {
                Greeted::Waits(greeting) => {
                    self.greetings.insert(token, greeting);
                }
                Greeted::Wants(stream, guest_port) if !hung_up => {
                    self.ask_guest(token, stream, guest_port);
                }
                Greeted::Wants(..) | Greeted::Refused => {
                    tracing::debug!("vsock: a host's connection came without a greeting");
                }
            }
        } else if let Some(key) = self.by_token.get(&token).copied() {
            if let Some(connection) = self.connections.get_mut(&key) {
                connection.ready(hung_up, scratch(&mut self.scratch));
            }
            self.list(key);
        } else if let Some(outlet) = self.draining.get_mut(&token) {
            outlet.ready();
            if outlet.is_done() {
                self.draining.remove(&token);
            }
        }
    }

    /// Whether there is room for what a packet of the guest may have to be answered with.
    pub(super) fn takes(&self) -> bool {
        self.refusals.len() < MOST_REFUSALS
    }

    /// Takes a packet of the guest. `payload` is what its header announces, if the guest has sent that
    /// much. `connect` connects to what listens on a port of the host.
    pub(super) fn take(
        &mut self,
        header: &Header,
        payload: Option<&[u8]>,
        connect: impl FnOnce(u32, Token) -> io::Result<S>,
    ) {
        let key = Key {
            host_port: header.dst_port,
            guest_port: header.src_port,
        };
        let known = header.src_cid == self.guest_cid
            && header.dst_cid == HOST_CID
            && header.kind == TYPE_STREAM;
        if !known {
            return self.refuse(header);
        }
        let Some(connection) = self.connections.get_mut(&key) else {
            return match header.op {
                op::REQUEST => self.connect(key, header, connect),
                _ => self.refuse(header),
            };
        };
        connection.hear_credit(header);
        let outcome = match (header.op, payload) {
            (op::RST, _) => {
                self.let_go(key);
                return;
            }
            (op::RESPONSE, _) => connection.on_response(key.host_port, scratch(&mut self.scratch)),
            (op::RW, Some(payload)) => connection.on_payload(payload),
            (op::SHUTDOWN, _) => connection.on_shutdown(header.flags),
            (op::CREDIT_UPDATE, _) => Outcome::GoesOn,
            (op::CREDIT_REQUEST, _) => connection.on_credit_request(),
            _ => Outcome::Violation,
        };
        match outcome {
            Outcome::GoesOn => self.list(key),
            Outcome::Finished => {
                self.let_go(key);
                self.refuse(header);
            }
            Outcome::Violation => {
                self.remove(key);
                self.refuse(header);
            }
        }
    }

    /// Whether there is a packet for the guest.
    pub(super) fn has_packet(&self) -> bool {
        let has_next = |key| {
            self.connections
                .get(key)
                .is_some_and(|connection| connection.next().is_some())
        };
        !self.refusals.is_empty() || self.turns.iter().any(has_next)
    }

    /// Sends the guest a packet with at most `room` bytes of payload: `put` stores header and payload.
    /// Returns how many bytes it was, `None` when there is no packet or no room for it. When `put`
    /// fails, the packet is still to be sent.
    pub(super) fn send<E>(
        &mut self,
        room: usize,
        put: impl FnOnce(&[u8; HEADER_LEN], &[u8]) -> Result<(), E>,
    ) -> Result<Option<usize>, E> {
        if let Some(refusal) = self.refusals.front() {
            put(&refusal.encode(), &[])?;
            self.refusals.pop_front();
            return Ok(Some(HEADER_LEN));
        }
        while let Some(&key) = self.turns.front() {
            let Some(connection) = self.connections.get_mut(&key) else {
                self.turns.pop_front();
                continue;
            };
            let Some(next) = connection.next() else {
                connection.listed = false;
                self.turns.pop_front();
                continue;
            };
            let payload = match next {
                Next::Payload if room == 0 => return Ok(None),
                Next::Payload => connection.payload(room),
                _ => &[],
            };
            let len = payload.len();
            let header = header_of(self.guest_cid, key, connection, next, len);
            put(&header.encode(), payload)?;
            self.turns.pop_front();
            connection.listed = false;
            connection.sent(next, len, scratch(&mut self.scratch));
            match next {
                Next::Reset => self.remove(key),
                _ => self.list(key),
            }
            return Ok(Some(HEADER_LEN + len));
        }
        Ok(None)
    }

    /// A guest's REQUEST, of a connection that does not exist.
    fn connect(
        &mut self,
        key: Key,
        header: &Header,
        connect: impl FnOnce(u32, Token) -> io::Result<S>,
    ) {
        if !self.make_room() {
            tracing::debug!(
                port = key.host_port,
                "vsock: a connection too many is refused"
            );
            return self.refuse(header);
        }
        let token = self.new_token();
        match connect(key.host_port, token) {
            Ok(stream) => {
                let mut connection = Connection::accepted(token, stream);
                connection.hear_credit(header);
                self.insert(key, connection);
                // What the host has sent already gave its hint before there was a connection.
                self.ready(token, false);
            }
            Err(error) => {
                tracing::debug!(port = key.host_port, %error, "vsock: nobody answers the guest");
                self.refuse(header);
            }
        }
    }

    /// Begins a connection that the host asks for, on a port of its own that is free.
    fn ask_guest(&mut self, token: Token, stream: S, guest_port: u32) {
        let host_port = loop {
            let port = self.next_host_port;
            // From the highest one it goes on with the first: there are far more than connections.
            self.next_host_port = port.checked_add(1).unwrap_or(FIRST_HOST_PORT);
            let key = Key {
                host_port: port,
                guest_port,
            };
            if !self.connections.contains_key(&key) {
                break port;
            }
        };
        let key = Key {
            host_port,
            guest_port,
        };
        self.insert(key, Connection::asking(token, stream));
        self.list(key);
    }

    fn insert(&mut self, key: Key, connection: Connection<S>) {
        self.by_token.insert(connection.token, key);
        self.connections.insert(key, connection);
    }

    /// Gives a connection its turn, if it has something for the guest.
    fn list(&mut self, key: Key) {
        if let Some(connection) = self.connections.get_mut(&key)
            && !connection.listed
            && connection.next().is_some()
        {
            connection.listed = true;
            self.turns.push_back(key);
        }
    }

    fn refuse(&mut self, header: &Header) {
        // Section 5.10.6.4 asks for no answer to an RST, and two sides that gave one would not end.
        if header.op != op::RST {
            self.refusals.push_back(header.refusal());
        }
    }

    /// The guest needs a connection no more: what it has sent still goes to the host.
    fn let_go(&mut self, key: Key) {
        if let Some(connection) = self.take_out(key) {
            let token = connection.token;
            let outlet = connection.into_outlet();
            if !outlet.is_done() {
                self.draining.insert(token, outlet);
            }
        }
    }

    /// Ends a connection and closes its stream.
    fn remove(&mut self, key: Key) {
        drop(self.take_out(key));
    }

    fn take_out(&mut self, key: Key) -> Option<Connection<S>> {
        let connection = self.connections.remove(&key)?;
        self.by_token.remove(&connection.token);
        if connection.listed {
            self.turns.retain(|listed| *listed != key);
        }
        Some(connection)
    }

    fn streams(&self) -> usize {
        self.greetings.len() + self.connections.len() + self.draining.len()
    }

    /// Whether there is room for another stream. To make some, one is given up that only waits: for a
    /// host to read what its guest sent last, or for a guest's word that it has seen the end.
    fn make_room(&mut self) -> bool {
        if self.streams() < MOST_CONNECTIONS || self.draining.pop_first().is_some() {
            return true;
        }
        let over = self
            .connections
            .iter()
            .find(|(_, connection)| connection.is_over());
        let Some((&key, connection)) = over.filter(|_| self.takes()) else {
            return false;
        };
        let reset = header_of(self.guest_cid, key, connection, Next::Reset, 0);
        self.refusals.push_back(reset);
        self.remove(key);
        true
    }
}

/// The header of what a connection tells the guest next.
fn header_of<S: HostStream>(
    guest_cid: u64,
    key: Key,
    connection: &Connection<S>,
    next: Next,
    len: usize,
) -> Header {
    let (op, flags) = match next {
        Next::Request => (op::REQUEST, 0),
        Next::Response => (op::RESPONSE, 0),
        Next::Payload => (op::RW, 0),
        Next::CreditUpdate => (op::CREDIT_UPDATE, 0),
        Next::CreditRequest => (op::CREDIT_REQUEST, 0),
        Next::Shutdown(flags) => (op::SHUTDOWN, flags),
        Next::Reset => (op::RST, 0),
    };
    let (buf_alloc, fwd_cnt) = connection.credit();
    Header {
        src_cid: HOST_CID,
        dst_cid: guest_cid,
        src_port: key.host_port,
        dst_port: key.guest_port,
        len: len as u32,
        kind: TYPE_STREAM,
        op,
        flags,
        buf_alloc,
        fwd_cnt,
    }
}

/// Room for one read of a stream. Made when it is first needed: an idle clone has none.
fn scratch(buffer: &mut Vec<u8>) -> &mut [u8] {
    buffer.resize(READ_LEN, 0);
    buffer
}

#[cfg(test)]
mod tests;
