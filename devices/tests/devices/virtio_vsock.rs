//! The socket device between a guest that is driven by hand and programs of the host on Unix sockets.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use forkvm_devices::Device;
use forkvm_devices::virtio::vsock::{Cid, SocketThread, UnixBackend};

use crate::driver::{read32, reg, status};
use crate::vsock_guest::{CID, Guest, HOST, Header, SHUT_RECEIVE, SHUT_SEND, op, until};

/// What a test's stream of 1 MiB consists of.
fn pattern(seed: u32) -> Vec<u8> {
    let byte = |at: u32| (at.wrapping_mul(0x9e37_79b1) ^ seed).to_le_bytes()[2];
    (0..1 << 20).map(byte).collect()
}

/// A guest with a host around it: the sockets' folder, and the thread that serves them.
pub(crate) struct Host {
    pub(crate) guest: Guest,
    _thread: SocketThread,
    folder: tempfile::TempDir,
}

impl Host {
    pub(crate) fn new(buffer_len: u32) -> Host {
        let folder = tempfile::tempdir().unwrap();
        let backend = UnixBackend::new(Some(folder.path().join("v"))).unwrap();
        let guest = Guest::new(Some(backend), buffer_len);
        let listener = UnixListener::bind(folder.path().join("v")).unwrap();
        let thread = SocketThread::start(guest.device.clone(), Some(listener)).unwrap();
        Host {
            guest,
            _thread: thread,
            folder,
        }
    }

    /// Where programs connect to the guest.
    fn path(&self) -> PathBuf {
        self.folder.path().join("v")
    }

    /// Listens on a port of the host.
    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.folder.path().join(format!("v_{port}"))).unwrap()
    }

    /// A program that asks for a port of the guest.
    fn dial(&self, port: u32) -> UnixStream {
        let mut program = UnixStream::connect(self.path()).unwrap();
        program
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        writeln!(program, "CONNECT {port}").unwrap();
        program
    }

    /// A program connected to `port` of the guest, and the port of its side.
    pub(crate) fn connected(&mut self, port: u32) -> (UnixStream, u32) {
        let mut program = self.dial(port);
        let (request, _) = self.guest.await_op(op::REQUEST);
        assert_eq!((request.src_cid, request.dst_cid), (HOST, CID));
        assert_eq!((request.dst_port, request.kind), (port, 1));
        assert!(request.buf_alloc > 0);
        self.guest
            .send(Header::new(op::RESPONSE, port, request.src_port), &[]);
        assert_eq!(line(&mut program), format!("OK {}\n", request.src_port));
        (program, request.src_port)
    }
}

fn line(program: &mut UnixStream) -> String {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        program.read_exact(&mut byte).unwrap();
        line.extend(byte);
    }
    String::from_utf8(line).unwrap()
}

fn is_at_end(program: &mut UnixStream) -> bool {
    matches!(program.read(&mut [0; 1]), Ok(0))
}

/// A guest's program that echoes: a stream's counters, and what it has still to send back.
struct Echo {
    guest_port: u32,
    host_port: u32,
    buf_alloc: u32,
    forwarded: u32,
    sent: u32,
    device_alloc: u32,
    device_forwarded: u32,
    pending: Vec<u8>,
    ended: bool,
}

impl Echo {
    fn header(&self, op: u16) -> Header {
        Header {
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.forwarded,
            ..Header::new(op, self.guest_port, self.host_port)
        }
    }

    /// One turn of a guest's loop; `true` once the host has ended and all has gone back.
    fn turn(&mut self, guest: &mut Guest) -> bool {
        while let Some((header, payload)) = guest.receive() {
            self.device_alloc = header.buf_alloc;
            self.device_forwarded = header.fwd_cnt;
            match header.op {
                op::RW => {
                    self.pending.extend(&payload);
                    assert!(self.pending.len() <= self.buf_alloc as usize);
                }
                op::CREDIT_REQUEST => guest.send(self.header(op::CREDIT_UPDATE), &[]),
                op::CREDIT_UPDATE => {}
                op::SHUTDOWN => {
                    assert_eq!(header.flags, SHUT_SEND, "it still wants its echo");
                    self.ended = true;
                }
                other => panic!("operation {other}"),
            }
        }
        let room = self.device_alloc - (self.sent - self.device_forwarded);
        let len = self.pending.len().min(room as usize).min(3000);
        if len > 0 {
            let part: Vec<_> = self.pending.drain(..len).collect();
            self.forwarded += len as u32;
            self.sent += len as u32;
            guest.send(self.header(op::RW), &part);
        }
        self.ended && self.pending.is_empty()
    }
}

#[test]
fn a_program_gets_its_mebibyte_back_through_small_buffers_and_ends_half_by_half() {
    let mut host = Host::new(44 + 500);
    let program = host.dial(52);
    let (request, _) = host.guest.await_op(op::REQUEST);
    let mut echo = Echo {
        guest_port: 52,
        host_port: request.src_port,
        buf_alloc: 4096,
        forwarded: 0,
        sent: 0,
        device_alloc: request.buf_alloc,
        device_forwarded: 0,
        pending: Vec::new(),
        ended: false,
    };
    host.guest.send(echo.header(op::RESPONSE), &[]);

    let data = pattern(1);
    let mut writer = program.try_clone().unwrap();
    let to_write = data.clone();
    let writing = thread::spawn(move || {
        writer.write_all(&to_write).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let mut reader = program;
    let reading = thread::spawn(move || {
        assert!(line(&mut reader).starts_with("OK "));
        let mut back = Vec::new();
        reader.read_to_end(&mut back).unwrap();
        back
    });
    until("the end of the stream", || {
        echo.turn(&mut host.guest).then_some(())
    });
    // The guest has sent all and closes: a clean end is a reset.
    let close = Header {
        flags: SHUT_SEND | SHUT_RECEIVE,
        ..echo.header(op::SHUTDOWN)
    };
    host.guest.send(close, &[]);
    until("the reset", || match host.guest.receive() {
        Some((header, _)) => (header.op == op::RST).then_some(()),
        None => None,
    });
    writing.join().unwrap();
    assert!(reading.join().unwrap() == data);
}

#[test]
fn a_guest_connects_to_what_listens_and_talks_both_ways() {
    let mut host = Host::new(4096);
    let listener = host.listen(1234);
    host.guest.send(Header::new(op::REQUEST, 9, 1234), &[]);
    let (response, _) = host.guest.await_op(op::RESPONSE);
    assert_eq!((response.src_port, response.dst_port), (1234, 9));
    let (mut program, _) = listener.accept().unwrap();
    host.guest.send(Header::new(op::RW, 9, 1234), b"hello");
    let mut heard = [0; 5];
    program.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"hello");
    program.write_all(b"good day").unwrap();
    assert_eq!(host.guest.await_op(op::RW).1, b"good day");
    // The guest sends no more, but listens on.
    let end = Header {
        flags: SHUT_SEND,
        ..Header::new(op::SHUTDOWN, 9, 1234)
    };
    host.guest.send(end, &[]);
    assert!(is_at_end(&mut program));
    program.write_all(b"bye").unwrap();
    assert_eq!(host.guest.await_op(op::RW).1, b"bye");
    drop(program);
    let (shutdown, _) = host.guest.await_op(op::SHUTDOWN);
    assert_eq!(shutdown.flags, SHUT_SEND | SHUT_RECEIVE);
    host.guest.send(Header::new(op::RST, 9, 1234), &[]);
    // The same ports can be used again.
    host.guest.send(Header::new(op::REQUEST, 9, 1234), &[]);
    host.guest.await_op(op::RESPONSE);
}

#[test]
fn a_guests_connect_that_nobody_answers_is_refused() {
    let mut host = Host::new(4096);
    drop(host.listen(77));
    for port in [76, 77] {
        host.guest.send(Header::new(op::REQUEST, 9, port), &[]);
        let (reset, _) = host.guest.await_op(op::RST);
        assert_eq!((reset.src_port, reset.dst_port), (port, 9));
    }
    // Here somebody listens, and never accepts: a connect that waited would hold the vCPU.
    let _listener = host.listen(78);
    let mut answers = Vec::new();
    for guest_port in 0..140 {
        let request = Header::new(op::REQUEST, guest_port, 78);
        host.guest.send(request, &[]);
        answers.push(host.guest.await_packet().0.op);
    }
    assert!(answers.contains(&op::RST) && answers.contains(&op::RESPONSE));
}

#[test]
fn without_a_backend_every_connect_is_refused() {
    let mut guest = Guest::new(None, 4096);
    guest.send(Header::new(op::REQUEST, 9, 1234), &[]);
    assert_eq!(guest.receive().unwrap().0.op, op::RST);
    assert!(SocketThread::start(guest.device, None).is_err());
}

#[test]
fn a_guests_refusal_hangs_up_on_the_program() {
    let mut host = Host::new(4096);
    let mut program = host.dial(52);
    let (request, _) = host.guest.await_op(op::REQUEST);
    host.guest
        .send(Header::new(op::RST, 52, request.src_port), &[]);
    assert!(is_at_end(&mut program));
}

#[test]
fn a_program_that_reads_slowly_stops_its_guest_by_credit_and_nobody_else() {
    let mut host = Host::new(4096);
    let (mut slow, slow_port) = host.connected(1);
    let (mut quick, quick_port) = host.connected(2);
    let data = pattern(3);
    let (mut sent, mut forwarded, mut alloc) = (0usize, 0u32, 64 * 1024);
    let mut hear = |guest: &mut Guest, forwarded: &mut u32| {
        while let Some((header, _)) = guest.receive() {
            if header.dst_port == 1 {
                assert_eq!(header.op, op::CREDIT_UPDATE);
                (*forwarded, alloc) = (header.fwd_cnt, header.buf_alloc as usize);
            }
        }
        alloc
    };
    // Until its credit is used up: then the host's socket and the device's buffer are full.
    loop {
        let alloc = hear(&mut host.guest, &mut forwarded);
        let len = (alloc - (sent - forwarded as usize)).min(8000);
        if len == 0 {
            break;
        }
        let header = Header::new(op::RW, 1, slow_port);
        host.guest.send(header, &data[sent..sent + len]);
        sent += len;
        assert!(sent < 1_000_000, "a socket holds no such amount");
    }
    // The other one is not held up.
    host.guest
        .send(Header::new(op::RW, 2, quick_port), b"quick");
    let mut heard = [0; 5];
    quick.read_exact(&mut heard).unwrap();
    // Read at last, all of it arrives, and the guest gets its credit back.
    let mut all = vec![0; sent];
    slow.read_exact(&mut all).unwrap();
    assert!(all == data[..sent]);
    until("credit", || {
        let alloc = hear(&mut host.guest, &mut forwarded);
        (sent - forwarded as usize <= alloc / 2).then_some(())
    });
}

#[test]
fn what_a_program_sends_waits_for_the_guests_buffers() {
    let mut host = Host::new(4096);
    let (mut program, _) = host.connected(1);
    let data = &pattern(5)[..100_000];
    program.write_all(data).unwrap();
    // Each buffer that came is kept, so the device runs out of them.
    let (mut received, mut kept) = (Vec::new(), Vec::new());
    while kept.len() < 16 {
        let (head, header, payload) = until("data", || host.guest.receive_and_keep());
        assert_eq!(header.op, op::RW);
        received.extend(payload);
        kept.push(head);
    }
    assert!(received.len() < 70_000);
    thread::sleep(Duration::from_millis(20));
    assert!(host.guest.receive().is_none());
    until("the rest", || {
        for head in kept.drain(..) {
            host.guest.give_back(head);
        }
        while let Some((_, payload)) = host.guest.receive() {
            received.extend(payload);
        }
        (received.len() >= data.len()).then_some(())
    });
    assert!(received == data);
}

#[test]
fn a_clone_has_no_connection_and_its_own_cid_and_the_parents_go_on() {
    let mut host = Host::new(4096);
    let (mut program, port) = host.connected(52);
    // At the fork a packet lies in the transmit queue that was not announced, and one in the receive
    // queue that the guest has not looked at.
    program.write_all(b"before").unwrap();
    assert_eq!(host.guest.await_op(op::RW).1, b"before");
    program.write_all(b"at the fork").unwrap();
    until("a packet", || host.guest.has_unread().then_some(()));
    let rw = Header {
        len: 4,
        ..Header::new(op::RW, 52, port)
    };
    host.guest.post(&rw, b"late");

    let mut clone = host.guest.clone_vm(8, None);
    assert_eq!((clone.cid(), host.guest.cid()), (8, CID));
    clone.activate();
    // What was in memory at the fork is there; what it belongs to is not.
    let (header, payload) = clone.receive().unwrap();
    assert_eq!(
        (header.op, payload.as_slice()),
        (op::RW, &b"at the fork"[..])
    );
    assert!(clone.sent(), "the packet that lay in the queue was taken");
    assert_eq!(clone.receive().unwrap().0.op, op::RST);
    assert_eq!(clone.event(), None, "there is no buffer for it yet");
    clone.give_event_buffer();
    assert_eq!(clone.event(), Some(0), "TRANSPORT_RESET");
    clone.give_event_buffer();
    assert_eq!(clone.event(), None, "once");

    // The parent never notices.
    host.guest.activate();
    assert!(host.guest.sent());
    let mut heard = [0; 4];
    program.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"late");
    assert_eq!(host.guest.await_op(op::RW).1, b"at the fork");
    host.guest.give_event_buffer();
    assert_eq!(host.guest.event(), None);
}

#[test]
fn a_reset_that_found_no_buffer_is_owed_by_the_next_restore_too() {
    let parent = Guest::new(None, 4096);
    let mut first = parent.clone_vm(8, None);
    first.activate();
    assert_eq!(first.event(), None);
    let mut second = first.clone_vm(9, None);
    second.give_event_buffer();
    second.activate();
    assert_eq!(second.event(), Some(0));
}

#[test]
fn an_event_buffer_from_before_the_fork_gets_the_reset_at_once() {
    let mut parent = Guest::new(None, 4096);
    parent.give_event_buffer();
    assert_eq!(parent.event(), None);
    let mut clone = parent.clone_vm(8, None);
    clone.activate();
    assert_eq!(clone.event(), Some(0));
    assert!(clone.line.edges() > 0);
    assert_eq!(parent.event(), None);
}

#[test]
fn a_clone_with_a_backend_of_its_own_is_connected_to_anew() {
    let parent = Host::new(4096);
    let folder = tempfile::tempdir().unwrap();
    let backend = UnixBackend::new(None).unwrap();
    let mut clone = parent.guest.clone_vm(8, Some(backend));
    let listener = UnixListener::bind(folder.path().join("c")).unwrap();
    let _thread = SocketThread::start(clone.device.clone(), Some(listener)).unwrap();
    clone.activate();
    let mut program = UnixStream::connect(folder.path().join("c")).unwrap();
    writeln!(program, "CONNECT 52").unwrap();
    let (request, _) = clone.await_op(op::REQUEST);
    assert_eq!(request.dst_cid, 8);
    let response = Header {
        src_cid: 8,
        ..Header::new(op::RESPONSE, 52, request.src_port)
    };
    clone.send(response, &[]);
    assert!(line(&mut program).starts_with("OK "));
    // Without a prefix it connects nowhere.
    let out = Header {
        src_cid: 8,
        ..Header::new(op::REQUEST, 9, 1)
    };
    clone.send(out, &[]);
    clone.await_op(op::RST);
}

#[test]
fn a_driver_that_resets_its_device_loses_its_connections() {
    let mut host = Host::new(4096);
    let (mut program, _) = host.connected(52);
    host.guest.start();
    assert!(is_at_end(&mut program));
    let (_program, _) = host.connected(52);
}

#[test]
fn hostile_packets_are_refused_or_dropped_and_others_go_on() {
    let mut host = Host::new(4096);
    let (mut program, port) = host.connected(52);
    let good = Header::new(op::RW, 3, 4);
    for bad in [
        good,
        Header {
            src_cid: 99,
            ..good
        },
        Header { dst_cid: 5, ..good },
        Header { kind: 2, ..good },
        Header { op: 99, ..good },
        // It announces more than it has, or than anybody may send.
        Header { len: 100, ..good },
        Header {
            len: u32::MAX,
            ..good
        },
    ] {
        assert!(host.guest.try_send(&bad, &[]));
        let (reset, _) = host.guest.await_op(op::RST);
        assert_eq!((reset.src_cid, reset.dst_cid), (bad.dst_cid, bad.src_cid));
        assert_eq!((reset.src_port, reset.dst_port), (4, 3));
    }
    // Too short for a header, outside of memory, and a buffer of the wrong direction: they come back.
    assert!(host.guest.send_raw(&[0; 43], 43));
    assert!(host.guest.send_raw(&[0; 44], u32::MAX));
    assert!(host.guest.receive().is_none());
    // The stream beside has lost nothing.
    host.guest
        .send(Header::new(op::RW, 52, port), b"still here");
    let mut heard = [0; 10];
    program.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"still here");
    // Until its own guest breaks it.
    let bad = Header {
        len: 100,
        ..Header::new(op::RW, 52, port)
    };
    assert!(host.guest.try_send(&bad, &[]));
    host.guest.await_op(op::RST);
    assert!(is_at_end(&mut program));
    let mut device = host.guest.device.lock().unwrap();
    let state = read32(&mut *device, reg::STATUS);
    assert_eq!(state & status::NEEDS_RESET, 0);
}

#[test]
fn a_flood_that_nobody_fetches_the_answers_of_stays_in_the_guests_queue() {
    let mut guest = Guest::new(None, 4096);
    let mut taken = 0;
    let mut kept = Vec::new();
    while guest.try_send(&Header::new(op::REQUEST, taken, 1), &[]) {
        taken += 1;
        assert!(taken < 1000);
    }
    // 16 answers have found a buffer; 128 wait in the device.
    assert_eq!(taken, 16 + 128);
    while let Some((head, header, _)) = guest.receive_and_keep() {
        assert_eq!(header.op, op::RST);
        kept.push(head);
    }
    assert_eq!(kept.len(), 16);
    for head in kept {
        guest.give_back(head);
    }
    assert!(
        guest.sent(),
        "the last packet was taken when there was room"
    );
}

#[test]
fn receive_buffers_that_are_too_small_come_back_empty_and_lose_nothing() {
    let mut guest = Guest::new(None, 40);
    guest.send(Header::new(op::REQUEST, 9, 1), &[]);
    let mut device = guest.device.lock().unwrap();
    assert_eq!(
        read32(&mut *device, reg::STATUS) & status::NEEDS_RESET,
        0,
        "that is no broken queue"
    );
}

#[test]
fn while_the_brake_is_pulled_no_guest_memory_is_touched_and_nothing_is_lost() {
    let mut host = Host::new(4096);
    let (mut program, _) = host.connected(52);
    host.guest.brake.pull();
    host.guest
        .brake
        .until_still(Duration::from_secs(20))
        .unwrap();
    let before = crate::driver::all(&host.guest.memory);
    program.write_all(b"in the pause").unwrap();
    thread::sleep(Duration::from_millis(50));
    assert!(crate::driver::all(&host.guest.memory) == before);
    let saved = host.guest.device.lock().unwrap().save().unwrap();
    assert_eq!(saved.kind, "dev/dut");
    host.guest.brake.release();
    let (_, payload) = until("the data", || {
        // As a vCPU does before it runs again.
        if host.guest.brake.take_left_over() {
            host.guest.activate();
        }
        host.guest.receive()
    });
    assert_eq!(payload, b"in the pause");
}

#[test]
fn a_condemned_machines_thread_does_nothing_and_ends() {
    let mut host = Host::new(4096);
    let (mut program, _) = host.connected(52);
    host.guest.brake.condemn();
    let before = crate::driver::all(&host.guest.memory);
    program.write_all(b"too late").unwrap();
    thread::sleep(Duration::from_millis(50));
    assert!(crate::driver::all(&host.guest.memory) == before);
    drop(host);
    assert!(is_at_end(&mut program));
}

#[test]
fn a_thread_ends_while_programs_are_connected() {
    let (sender, ended) = mpsc::channel();
    let ending = thread::spawn(move || {
        let mut host = Host::new(4096);
        let connected = host.connected(52);
        drop(host);
        sender.send(()).unwrap();
        connected
    });
    ended.recv_timeout(Duration::from_secs(20)).unwrap();
    let (mut program, _) = ending.join().unwrap();
    assert!(is_at_end(&mut program));
}

#[test]
fn a_cid_of_the_host_or_of_everybody_is_no_guests() {
    for number in [0, 1, 2, u64::from(u32::MAX), 1 << 32] {
        assert!(Cid::new(number).is_err());
    }
    assert_eq!(Cid::new(3).unwrap().number(), 3);
}
