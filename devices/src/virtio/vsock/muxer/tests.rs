//! The muxer against a guest and hosts in memory: well-behaved ones that lose nothing, and a guest
//! that sends what it likes.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::net::Shutdown;
use std::sync::{Arc, Mutex, MutexGuard};

use proptest::prelude::*;

use super::super::connection::{TO_GUEST, TO_HOST};
use super::super::packet::shutdown;
use super::*;

const GUEST: u64 = 7;

/// A host's stream: what its program has written and not been read yet, and the other way round.
#[derive(Default)]
struct Pipe {
    to_device: VecDeque<u8>,
    /// The program sends no more.
    ended: bool,
    to_program: VecDeque<u8>,
    /// Bytes that may wait for the program.
    capacity: usize,
    /// The program is gone.
    hung_up: bool,
    /// What the device has shut.
    device_ended: bool,
    device_closed: bool,
}

#[derive(Clone)]
struct Program(Arc<Mutex<Pipe>>);

struct End(Program);

impl Program {
    fn new(capacity: usize) -> Program {
        Program(Arc::new(Mutex::new(Pipe {
            capacity,
            ..Pipe::default()
        })))
    }

    fn end(&self) -> End {
        End(self.clone())
    }

    fn pipe(&self) -> MutexGuard<'_, Pipe> {
        self.0.lock().unwrap()
    }

    fn write(&self, bytes: impl IntoIterator<Item = u8>) {
        self.pipe().to_device.extend(bytes);
    }

    fn read(&self, most: usize) -> Vec<u8> {
        let mut pipe = self.pipe();
        let len = most.min(pipe.to_program.len());
        pipe.to_program.drain(..len).collect()
    }
}

impl HostStream for End {
    fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
        let mut pipe = self.0.pipe();
        assert!(!data.is_empty());
        let len = data.len().min(pipe.to_device.len());
        if len == 0 && !pipe.ended {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        for (place, byte) in data.iter_mut().zip(pipe.to_device.drain(..len)) {
            *place = byte;
        }
        Ok(len)
    }

    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let mut pipe = self.0.pipe();
        assert!(!data.is_empty());
        if pipe.hung_up {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let len = data.len().min(pipe.capacity - pipe.to_program.len());
        if len == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        pipe.to_program.extend(&data[..len]);
        Ok(len)
    }

    fn shutdown(&mut self, how: Shutdown) -> io::Result<()> {
        if how != Shutdown::Read {
            self.0.pipe().device_ended = true;
        }
        Ok(())
    }
}

impl Drop for End {
    fn drop(&mut self) {
        self.0.pipe().device_closed = true;
    }
}

impl Muxer<End> {
    fn check(&self) {
        assert!(self.streams() <= MOST_CONNECTIONS);
        assert!(self.refusals.len() <= MOST_REFUSALS + 1);
        assert_eq!(self.by_token.len(), self.connections.len());
        let listed: BTreeSet<_> = self.turns.iter().collect();
        assert_eq!(listed.len(), self.turns.len(), "nobody has two turns");
        for (key, connection) in &self.connections {
            assert!(connection.is_bounded());
            assert_eq!(self.by_token[&connection.token], *key);
            assert_eq!(connection.listed, listed.contains(key));
            assert!(
                connection.listed || connection.next().is_none(),
                "who has something to say has a turn"
            );
        }
        assert!(listed.iter().all(|key| self.connections.contains_key(key)));
    }

    /// The next packet, if there is one that fits.
    fn fetch(&mut self, room: usize) -> Option<(Header, Vec<u8>)> {
        let mut fetched = None;
        let sent = self.send(room, |header, payload| {
            fetched = Some((Header::decode(header), payload.to_vec()));
            Ok::<_, Infallible>(())
        });
        match sent {
            Ok(sent) => assert_eq!(sent.is_some(), fetched.is_some()),
        }
        if let Some((header, payload)) = &fetched {
            assert_eq!(header.len as usize, payload.len());
            assert!(payload.len() <= room);
        }
        self.check();
        fetched
    }

    /// Admits a stream and has it greet.
    fn greeted(&mut self, program: &Program, port: u32) -> Token {
        let token = self.new_token();
        program.write(format!("CONNECT {port}\n").bytes());
        self.admit(token, program.end());
        self.check();
        token
    }
}

fn nobody(_port: u32, _token: Token) -> io::Result<End> {
    Err(io::ErrorKind::ConnectionRefused.into())
}

fn from_guest(op: u16, guest_port: u32, host_port: u32) -> Header {
    Header {
        src_cid: GUEST,
        dst_cid: HOST_CID,
        src_port: guest_port,
        dst_port: host_port,
        kind: TYPE_STREAM,
        op,
        buf_alloc: 4096,
        ..Header::default()
    }
}

/// Byte `at` of a stream: one that is lost, doubled or misplaced is noticed.
fn byte(stream: usize, at: usize) -> u8 {
    (at as u32)
        .wrapping_mul(0x9e37_79b1)
        .wrapping_add(stream as u32 * 77)
        .to_le_bytes()[2]
}

/// One connection as its guest and its program see it.
struct Talk {
    number: usize,
    program: Program,
    token: Token,
    host_port: u32,
    guest_port: u32,
    buf_alloc: u32,
    /// Bytes that the guest was sent, has read, and has told to have read.
    received: usize,
    read: usize,
    told: usize,
    /// Bytes that the guest has sent, and what it knows of the device's buffer.
    sent: usize,
    device_alloc: usize,
    device_forwarded: usize,
    /// Bytes that the program has written and read.
    written: usize,
    had: usize,
    program_ended: bool,
    guest_ended: bool,
    told_program_ended: bool,
}

impl Talk {
    fn header(&mut self, op: u16) -> Header {
        self.told = self.read;
        Header {
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.read as u32,
            ..from_guest(op, self.guest_port, self.host_port)
        }
    }

    fn guest_writes(&mut self, muxer: &mut Muxer<End>, most: usize) {
        let room = self.device_alloc - (self.sent - self.device_forwarded);
        let len = most.min(room);
        if len == 0 || self.guest_ended {
            return;
        }
        let payload: Vec<_> = (self.sent..self.sent + len)
            .map(|at| byte(self.number, at))
            .collect();
        self.sent += len;
        let header = Header {
            len: len as u32,
            ..self.header(op::RW)
        };
        muxer.take(&header, Some(&payload), nobody);
        muxer.check();
    }

    fn guest_reads(&mut self, muxer: &mut Muxer<End>, most: usize) {
        self.read += most.min(self.received - self.read);
        let update = self.header(op::CREDIT_UPDATE);
        muxer.take(&update, None, nobody);
        muxer.check();
    }

    fn program_writes(&mut self, muxer: &mut Muxer<End>, len: usize) {
        if self.program_ended {
            return;
        }
        let number = self.number;
        self.program
            .write((self.written..self.written + len).map(|at| byte(number + 100, at)));
        self.written += len;
        muxer.ready(self.token, false);
        muxer.check();
    }

    fn program_reads(&mut self, muxer: &mut Muxer<End>, most: usize) {
        for got in self.program.read(most) {
            assert_eq!(got, byte(self.number, self.had));
            self.had += 1;
        }
        muxer.ready(self.token, false);
        muxer.check();
    }

    fn program_ends(&mut self, muxer: &mut Muxer<End>) {
        self.program_ended = true;
        self.program.pipe().ended = true;
        muxer.ready(self.token, false);
        muxer.check();
    }

    fn guest_ends(&mut self, muxer: &mut Muxer<End>) {
        if !self.guest_ended {
            self.guest_ended = true;
            let header = Header {
                flags: shutdown::SEND,
                ..self.header(op::SHUTDOWN)
            };
            muxer.take(&header, None, nobody);
            muxer.check();
        }
    }

    /// The guest gets a packet.
    fn hear(&mut self, muxer: &mut Muxer<End>, header: &Header, payload: &[u8]) {
        self.device_alloc = header.buf_alloc as usize;
        self.device_forwarded = header.fwd_cnt as usize;
        assert!(self.device_forwarded <= self.sent);
        match header.op {
            op::RW => {
                assert!(!payload.is_empty());
                assert!(!self.told_program_ended, "nothing comes after the end");
                for &got in payload {
                    assert_eq!(got, byte(self.number + 100, self.received));
                    self.received += 1;
                }
                let under_way = self.received - self.told;
                assert!(under_way <= self.buf_alloc as usize, "credit is kept");
            }
            op::CREDIT_REQUEST => {
                let update = self.header(op::CREDIT_UPDATE);
                muxer.take(&update, None, nobody);
            }
            op::CREDIT_UPDATE => {}
            op::SHUTDOWN => {
                assert_eq!(header.flags, shutdown::SEND);
                assert!(self.program_ended && self.received == self.written);
                self.told_program_ended = true;
            }
            other => panic!("operation {other} in the middle of a stream"),
        }
        muxer.check();
    }
}

/// Three streams that are open: the first by the guest, the others by programs.
fn three_talks(muxer: &mut Muxer<End>, buf_alloc: u32, capacity: usize) -> Vec<Talk> {
    let mut talks = Vec::new();
    for number in 0..3 {
        let program = Program::new(capacity.max(20));
        let guest_port = 1000 + number as u32;
        let (token, host_port) = if number == 0 {
            let mut token = None;
            muxer.take(
                &Header {
                    buf_alloc,
                    ..from_guest(op::REQUEST, guest_port, 5)
                },
                None,
                |port, new| {
                    assert_eq!(port, 5);
                    token = Some(new);
                    Ok(program.end())
                },
            );
            let (response, _) = muxer.fetch(0).unwrap();
            assert_eq!((response.op, response.src_port), (op::RESPONSE, 5));
            (token.unwrap(), 5)
        } else {
            let token = muxer.greeted(&program, guest_port);
            let (request, _) = muxer.fetch(0).unwrap();
            assert_eq!(request.op, op::REQUEST);
            assert_eq!(request.dst_port, guest_port);
            let response = Header {
                buf_alloc,
                ..from_guest(op::RESPONSE, guest_port, request.src_port)
            };
            muxer.take(&response, None, nobody);
            let answer = program.read(100);
            assert_eq!(answer, format!("OK {}\n", request.src_port).into_bytes());
            muxer.ready(token, false);
            (token, request.src_port)
        };
        talks.push(Talk {
            number,
            program,
            token,
            host_port,
            guest_port,
            buf_alloc,
            received: 0,
            read: 0,
            told: 0,
            sent: 0,
            device_alloc: TO_HOST,
            device_forwarded: 0,
            written: 0,
            had: 0,
            program_ended: false,
            guest_ended: false,
            told_program_ended: false,
        });
    }
    talks
}

fn guest_fetches(muxer: &mut Muxer<End>, talks: &mut [Talk], room: usize) -> bool {
    let Some((header, payload)) = muxer.fetch(room) else {
        return false;
    };
    assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, GUEST));
    let talk = talks
        .iter_mut()
        .find(|talk| (talk.host_port, talk.guest_port) == (header.src_port, header.dst_port))
        .expect("a packet is for a stream that is open");
    talk.hear(muxer, &header, &payload);
    true
}

#[derive(Clone, Debug)]
enum Step {
    GuestWrites(usize, usize),
    GuestReads(usize, usize),
    GuestFetches(usize),
    GuestEnds(usize),
    ProgramWrites(usize, usize),
    ProgramReads(usize, usize),
    ProgramEnds(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let (talk, len) = (0..3usize, 1..40_000usize);
    let both = (talk.clone(), len.clone());
    prop_oneof![
        4 => both.clone().prop_map(|(talk, len)| Step::GuestWrites(talk, len)),
        4 => both.clone().prop_map(|(talk, len)| Step::GuestReads(talk, len)),
        12 => (0..9000usize).prop_map(Step::GuestFetches),
        1 => talk.clone().prop_map(Step::GuestEnds),
        4 => both.clone().prop_map(|(talk, len)| Step::ProgramWrites(talk, len)),
        4 => both.prop_map(|(talk, len)| Step::ProgramReads(talk, len)),
        1 => talk.prop_map(Step::ProgramEnds),
    ]
}

proptest! {
    #[test]
    fn streams_lose_double_and_reorder_nothing_and_keep_their_credit(
        steps in proptest::collection::vec(step(), 1..150),
        buf_alloc in 1u32..100_000,
        capacity in 1usize..100_000,
    ) {
        let mut muxer = Muxer::new(GUEST);
        let mut talks = three_talks(&mut muxer, buf_alloc, capacity);
        for step in steps {
            match step {
                Step::GuestWrites(talk, len) => talks[talk].guest_writes(&mut muxer, len),
                Step::GuestReads(talk, len) => talks[talk].guest_reads(&mut muxer, len),
                Step::GuestEnds(talk) => talks[talk].guest_ends(&mut muxer),
                Step::ProgramWrites(talk, len) => talks[talk].program_writes(&mut muxer, len),
                Step::ProgramReads(talk, len) => talks[talk].program_reads(&mut muxer, len),
                Step::ProgramEnds(talk) => talks[talk].program_ends(&mut muxer),
                Step::GuestFetches(room) => {
                    guest_fetches(&mut muxer, &mut talks, room);
                }
            }
        }
        // In the end all of it arrives, in both directions, and then both ends.
        for talk in &mut talks {
            talk.guest_ends(&mut muxer);
            talk.program_ends(&mut muxer);
        }
        loop {
            let mut moved = guest_fetches(&mut muxer, &mut talks, 4096);
            for talk in &mut talks {
                let before = (talk.read, talk.had);
                talk.guest_reads(&mut muxer, usize::MAX);
                talk.program_reads(&mut muxer, usize::MAX);
                moved |= before != (talk.read, talk.had);
            }
            if !moved {
                break;
            }
        }
        for talk in &talks {
            prop_assert_eq!((talk.received, talk.had), (talk.written, talk.sent));
            prop_assert!(talk.told_program_ended && talk.program.pipe().device_ended);
        }
    }

    #[test]
    fn whatever_a_guest_sends_the_tables_stay_bounded(
        packets in proptest::collection::vec(any_packet(), 1..400),
        fetch_every in 1usize..20,
    ) {
        let mut muxer = Muxer::new(GUEST);
        let program = Program::new(1000);
        muxer.greeted(&program, 1);
        for (number, (header, payload, connects)) in packets.into_iter().enumerate() {
            let payload = payload.map(|len| vec![1; len]);
            if muxer.takes() {
                muxer.take(&header, payload.as_deref(), |_, _| {
                    if connects { Ok(Program::new(100).end()) } else { Err(io::ErrorKind::Other.into()) }
                });
            }
            muxer.check();
            if number % fetch_every == 0 {
                muxer.fetch(number * 7 % 100);
            }
        }
        while muxer.fetch(4096).is_some() {}
        prop_assert!(!muxer.has_packet());
    }
}

/// A packet of few ports and many contents, what it carries, and whether a host would listen.
fn any_packet() -> impl Strategy<Value = (Header, Option<usize>, bool)> {
    let port = prop_oneof![Just(1), Just(2), Just(1 << 30), any::<u32>()];
    let addresses = (
        prop_oneof![9 => Just(GUEST), 1 => any::<u64>()],
        prop_oneof![9 => Just(HOST_CID), 1 => any::<u64>()],
        1..4u32,
        port,
    );
    let kind = prop_oneof![9 => Just(TYPE_STREAM), 1 => any::<u16>()];
    let content = (kind, 0..9u16, any::<u32>(), any::<u32>(), any::<u32>());
    let payload = prop_oneof![Just(None), (0..TO_HOST + 10).prop_map(Some)];
    (addresses, content, payload, any::<bool>()).prop_map(
        |(addresses, content, payload, connects)| {
            let (src_cid, dst_cid, src_port, dst_port) = addresses;
            let (kind, op, flags, buf_alloc, fwd_cnt) = content;
            let len = payload.unwrap_or(0) as u32;
            let header = Header {
                src_cid,
                dst_cid,
                src_port,
                dst_port,
                len,
                kind,
                op,
                flags,
                buf_alloc,
                fwd_cnt,
            };
            (header, payload, connects)
        },
    )
}

#[test]
fn a_flood_of_requests_ends_at_the_bounds() {
    let mut muxer = Muxer::new(GUEST);
    let mut taken = 0;
    for port in 0..100_000 {
        if !muxer.takes() {
            break;
        }
        taken += 1;
        let request = from_guest(op::REQUEST, port, 5);
        muxer.take(&request, None, |_, _| Ok(Program::new(10).end()));
    }
    muxer.check();
    assert_eq!(taken, MOST_CONNECTIONS + MOST_REFUSALS);
    let answers: Vec<_> = std::iter::from_fn(|| muxer.fetch(0)).collect();
    let refused = answers.iter().filter(|(header, _)| header.op == op::RST);
    assert_eq!(refused.count(), MOST_REFUSALS);
    assert!(muxer.takes());
}

#[test]
fn requests_and_resets_in_turns_leave_nothing_behind() {
    let mut muxer = Muxer::new(GUEST);
    for _ in 0..1000 {
        let request = from_guest(op::REQUEST, 9, 5);
        muxer.take(&request, None, |_, _| Ok(Program::new(10).end()));
        muxer.take(&from_guest(op::RST, 9, 5), None, nobody);
        muxer.check();
    }
    assert!(!muxer.has_packet() && muxer.streams() == 0);
}

#[test]
fn a_program_that_never_reads_costs_the_guests_credit_and_no_more() {
    let mut muxer = Muxer::new(GUEST);
    let mut talks = three_talks(&mut muxer, 4096, 1000);
    talks[1].guest_writes(&mut muxer, usize::MAX);
    assert_eq!(talks[1].sent, TO_HOST);
    // 1000 bytes are in the program's socket: too few to be told of.
    assert!(!muxer.has_packet());
    // A guest that sends beyond its credit loses the stream.
    let header = Header {
        len: 1001,
        ..talks[1].header(op::RW)
    };
    muxer.take(&header, Some(&[0; 1001]), nobody);
    let (reset, _) = muxer.fetch(0).unwrap();
    assert_eq!(reset.op, op::RST);
    assert!(talks[1].program.pipe().device_closed);
    talks[2].guest_writes(&mut muxer, 10);
    talks[2].program_reads(&mut muxer, 10);
    assert_eq!(talks[2].had, 10, "others go on");
}

#[test]
fn a_guest_that_never_reads_leaves_the_rest_in_the_hosts_socket() {
    let mut muxer = Muxer::new(GUEST);
    let mut talks = three_talks(&mut muxer, 100, 1000);
    talks[1].program_writes(&mut muxer, 1_000_000);
    while guest_fetches(&mut muxer, &mut talks, 4096) {}
    assert_eq!(talks[1].received, 100, "as much as it has credit for");
    let left = talks[1].program.pipe().to_device.len();
    assert_eq!(left, 1_000_000 - 100 - TO_GUEST);
}

#[test]
fn streams_take_turns() {
    let mut muxer = Muxer::new(GUEST);
    let mut talks = three_talks(&mut muxer, 100_000, 1000);
    for talk in &mut talks {
        talk.program_writes(&mut muxer, 50_000);
    }
    for _ in 0..9 {
        guest_fetches(&mut muxer, &mut talks, 1000);
    }
    let received: Vec<_> = talks.iter().map(|talk| talk.received).collect();
    assert_eq!(received, [3000; 3]);
}

#[test]
fn what_the_guest_sent_before_it_closed_still_reaches_the_program() {
    for closing in [op::SHUTDOWN, op::RST] {
        let mut muxer = Muxer::new(GUEST);
        let mut talks = three_talks(&mut muxer, 100, 1000);
        let talk = &mut talks[0];
        talk.guest_writes(&mut muxer, 50_000);
        let header = Header {
            flags: shutdown::BOTH,
            ..talk.header(closing)
        };
        muxer.take(&header, None, nobody);
        muxer.check();
        let answer = muxer.fetch(0).map(|(header, _)| header.op);
        assert_eq!(answer, (closing == op::SHUTDOWN).then_some(op::RST));
        while talk.had < 50_000 {
            let before = talk.had;
            talk.program_reads(&mut muxer, 1000);
            assert!(talk.had > before);
        }
        assert!(talk.program.pipe().device_closed);
    }
}

#[test]
fn a_program_that_is_gone_ends_both_directions_once_its_last_bytes_are_through() {
    let mut muxer = Muxer::new(GUEST);
    let mut talks = three_talks(&mut muxer, 100_000, 1000);
    let talk = &mut talks[2];
    talk.program_writes(&mut muxer, 10);
    talk.program.pipe().ended = true;
    talk.program.pipe().hung_up = true;
    muxer.ready(talk.token, true);
    let packets: Vec<_> = std::iter::from_fn(|| muxer.fetch(4096)).collect();
    let ops: Vec<_> = packets.iter().map(|(header, _)| header.op).collect();
    assert_eq!(ops, [op::RW, op::SHUTDOWN]);
    assert_eq!(packets[1].0.flags, shutdown::BOTH);
    // The guest may not have seen it yet.
    talk.guest_writes(&mut muxer, 10);
    muxer.take(&talk.header(op::RST), None, nobody);
    assert!(talk.program.pipe().device_closed);
    assert_eq!(muxer.streams(), 2);
}

#[test]
fn streams_that_only_wait_make_room_for_new_ones() {
    let mut muxer = Muxer::new(GUEST);
    let mut gone = Vec::new();
    for port in 0..MOST_CONNECTIONS as u32 {
        let program = Program::new(10);
        muxer.take(&from_guest(op::REQUEST, port, 5), None, |_, token| {
            gone.push(token);
            Ok(program.end())
        });
        program.pipe().ended = true;
        program.pipe().hung_up = true;
    }
    let one_more = |muxer: &mut Muxer<End>| {
        let program = Program::new(100);
        muxer.greeted(&program, 99);
        !program.pipe().device_closed
    };
    while muxer.fetch(0).is_some() {}
    assert!(!one_more(&mut muxer), "all of them are open");
    for token in gone {
        muxer.ready(token, true);
    }
    while muxer.fetch(0).is_some() {}
    assert!(one_more(&mut muxer));
    muxer.check();
    let packets = std::iter::from_fn(|| muxer.fetch(0));
    let ops: Vec<_> = packets.map(|(header, _)| header.op).collect();
    assert_eq!(ops, [op::RST, op::REQUEST]);
}

#[test]
fn a_host_that_greets_otherwise_is_hung_up_on_and_one_that_is_slow_is_waited_for() {
    let mut muxer = Muxer::new(GUEST);
    for line in ["HELLO\n", "CONNECT x\n", &"C".repeat(1000)] {
        let program = Program::new(100);
        program.write(line.bytes());
        let token = muxer.new_token();
        muxer.admit(token, program.end());
        assert!(program.pipe().device_closed, "{line}");
    }
    let program = Program::new(100);
    let token = muxer.new_token();
    muxer.admit(token, program.end());
    for byte in "CONNECT 8".bytes() {
        program.write([byte]);
        muxer.ready(token, false);
        assert!(!muxer.has_packet());
    }
    program.write(*b"\nand more");
    muxer.ready(token, false);
    let (request, _) = muxer.fetch(0).unwrap();
    assert_eq!((request.op, request.dst_port), (op::REQUEST, 8));
    assert!(
        !muxer.has_packet(),
        "what comes after waits for the guest's answer"
    );
    let response = from_guest(op::RESPONSE, 8, request.src_port);
    muxer.take(&response, None, nobody);
    assert_eq!(muxer.fetch(100).unwrap().1, b"and more");
}

#[test]
fn a_program_that_gives_up_before_the_guest_answers_takes_the_request_back() {
    let mut muxer = Muxer::new(GUEST);
    let program = Program::new(100);
    let token = muxer.greeted(&program, 8);
    muxer.fetch(0).unwrap();
    muxer.ready(token, true);
    assert_eq!(muxer.fetch(0).unwrap().0.op, op::RST);
    assert_eq!(muxer.streams(), 0);
}

#[test]
fn a_packet_that_cannot_be_stored_is_sent_again() {
    let mut muxer = Muxer::new(GUEST);
    let mut talks = three_talks(&mut muxer, 100_000, 1000);
    talks[0].program_writes(&mut muxer, 10);
    assert!(muxer.send(100, |_, _| Err(())).is_err());
    assert!(guest_fetches(&mut muxer, &mut talks, 100));
    assert_eq!(talks[0].received, 10);
    muxer.take(&from_guest(op::RW, 1, 1), Some(&[]), nobody);
    assert!(muxer.send(100, |_, _| Err(())).is_err());
    assert_eq!(muxer.fetch(0).unwrap().0.op, op::RST);
}

#[test]
fn packets_that_belong_nowhere_are_refused_at_the_address_they_came_from() {
    let mut muxer = Muxer::new(GUEST);
    let good = from_guest(op::RW, 3, 4);
    for bad in [
        good,
        Header {
            src_cid: 99,
            ..good
        },
        Header { dst_cid: 1, ..good },
        Header { kind: 2, ..good },
        Header { op: 77, ..good },
        from_guest(op::REQUEST, 3, 4),
    ] {
        muxer.take(&bad, Some(&[]), nobody);
        assert_eq!(muxer.fetch(0).unwrap().0, bad.refusal());
        muxer.take(&Header { op: op::RST, ..bad }, None, nobody);
        assert!(!muxer.has_packet(), "a reset is not answered");
    }
}

#[test]
fn a_muxer_that_starts_over_knows_no_stream_and_no_token_again() {
    let mut muxer = Muxer::new(GUEST);
    let talks = three_talks(&mut muxer, 100, 1000);
    muxer.start_over(8);
    assert!(talks.iter().all(|talk| talk.program.pipe().device_closed));
    let program = Program::new(100);
    let token = muxer.greeted(&program, 1);
    assert!(talks.iter().all(|talk| talk.token < token));
    assert_eq!(muxer.fetch(0).unwrap().0.dst_cid, 8);
}
