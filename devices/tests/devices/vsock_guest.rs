//! A guest with a vsock driver, driven by hand: packets as a test wants them, through real queues.

use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use forkvm_devices::virtio::MmioTransport;
use forkvm_devices::virtio::vsock::{Cid, UnixBackend, UnixVsock, Vsock};
use forkvm_devices::{Brake, Device, GuestMemory};
use vm_memory::{Bytes, GuestAddress};

use crate::driver::{EVENT_IDX, Line, QUEUE_SIZE, VERSION_1, copy_of, ram, readable, writable};
use crate::ring::{self, Ring};

pub(crate) const CID: u64 = 7;
pub(crate) const HOST: u64 = 2;
pub(crate) const HEADER: usize = 44;

/// Operations of a packet (virtio 1.2 section 5.10.6).
pub(crate) mod op {
    pub(crate) const REQUEST: u16 = 1;
    pub(crate) const RESPONSE: u16 = 2;
    pub(crate) const RST: u16 = 3;
    pub(crate) const SHUTDOWN: u16 = 4;
    pub(crate) const RW: u16 = 5;
    pub(crate) const CREDIT_UPDATE: u16 = 6;
    pub(crate) const CREDIT_REQUEST: u16 = 7;
}

pub(crate) const SHUT_RECEIVE: u32 = 1;
pub(crate) const SHUT_SEND: u32 = 2;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const EVENT: usize = 2;

/// Where the guest has its buffers: one of 8 KiB for each receive descriptor, one for a packet to
/// send, and one for events.
pub(crate) const RECEIVE_AT: u64 = 0x1_0000;
const RECEIVE_STRIDE: u64 = 0x2000;
pub(crate) const TRANSMIT_AT: u64 = 0x4_0000;
const EVENT_AT: u64 = 0x8_0000;

/// How long the guest waits for what must come.
const PATIENCE: Duration = Duration::from_secs(20);

/// A packet without its payload.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) src_cid: u64,
    pub(crate) dst_cid: u64,
    pub(crate) src_port: u32,
    pub(crate) dst_port: u32,
    pub(crate) len: u32,
    pub(crate) kind: u16,
    pub(crate) op: u16,
    pub(crate) flags: u32,
    pub(crate) buf_alloc: u32,
    pub(crate) fwd_cnt: u32,
}

impl Header {
    /// A packet of a stream, from the guest to the host.
    pub(crate) fn new(op: u16, guest_port: u32, host_port: u32) -> Header {
        Header {
            src_cid: CID,
            dst_cid: HOST,
            src_port: guest_port,
            dst_port: host_port,
            kind: 1,
            op,
            buf_alloc: 1 << 20,
            ..Header::default()
        }
    }

    fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(self.src_cid.to_le_bytes());
        bytes.extend(self.dst_cid.to_le_bytes());
        for word in [self.src_port, self.dst_port, self.len] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(self.kind.to_le_bytes());
        bytes.extend(self.op.to_le_bytes());
        for word in [self.flags, self.buf_alloc, self.fwd_cnt] {
            bytes.extend(word.to_le_bytes());
        }
        bytes
    }

    fn decode(bytes: &[u8]) -> Header {
        let long = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let short = |at: usize| u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap());
        Header {
            src_cid: long(0),
            dst_cid: long(8),
            src_port: word(16),
            dst_port: word(20),
            len: word(24),
            kind: short(28),
            op: short(30),
            flags: word(32),
            buf_alloc: word(36),
            fwd_cnt: word(40),
        }
    }
}

/// A guest, and the device that it drives.
pub(crate) struct Guest {
    pub(crate) device: UnixVsock,
    pub(crate) memory: GuestMemory,
    pub(crate) line: Arc<Line>,
    pub(crate) brake: Brake,
    rings: Vec<Ring>,
    /// Length of a receive buffer.
    buffer_len: u32,
}

impl Guest {
    /// A guest whose driver runs, with receive buffers of `buffer_len` bytes.
    pub(crate) fn new(backend: Option<UnixBackend>, buffer_len: u32) -> Guest {
        let mut guest = Guest::unstarted(CID, backend, ram());
        guest.buffer_len = buffer_len;
        guest.start();
        guest
    }

    fn unstarted(cid: u64, backend: Option<UnixBackend>, memory: GuestMemory) -> Guest {
        let (line, brake) = (Arc::new(Line::default()), Brake::default());
        let vsock = Vsock::new(Cid::new(cid).unwrap(), backend);
        let device = MmioTransport::new(
            "dut".into(),
            vsock,
            memory.clone(),
            line.clone(),
            brake.clone(),
        );
        Guest {
            device: Arc::new(Mutex::new(device)),
            memory,
            line,
            brake,
            rings: Vec::new(),
            buffer_len: 0,
        }
    }

    /// A clone of this guest, in a VM of its own with the CID `cid`, and not yet activated.
    pub(crate) fn clone_vm(&self, cid: u64, backend: Option<UnixBackend>) -> Guest {
        let saved = self.device.lock().unwrap().save().unwrap();
        let mut clone = Guest::unstarted(1 << 20, backend, copy_of(&self.memory));
        clone.rings = self.rings.iter().map(Ring::copy).collect();
        clone.buffer_len = self.buffer_len;
        {
            let mut device = clone.device.lock().unwrap();
            device.restore(&saved).unwrap();
            device.model_mut().set_cid(Cid::new(cid).unwrap());
        }
        clone
    }

    /// Brings the driver up, as after a boot, with all receive buffers given to the device.
    pub(crate) fn start(&mut self) {
        let mut device = self.device.lock().unwrap();
        self.rings = ring::start(&mut *device, &self.memory, VERSION_1 | EVENT_IDX, 3);
        drop(device);
        for head in 0..QUEUE_SIZE {
            self.give_buffer(head);
        }
        self.notify(RECEIVE);
    }

    fn notify(&self, ring: usize) {
        self.rings[ring].notify(&mut *self.device.lock().unwrap());
    }

    fn give_buffer(&mut self, head: u16) {
        let at = RECEIVE_AT + RECEIVE_STRIDE * u64::from(head);
        self.rings[RECEIVE].offer(&self.memory, head, &[writable(at, self.buffer_len)]);
    }

    /// Gives the device a buffer for an event.
    pub(crate) fn give_event_buffer(&mut self) {
        self.rings[EVENT].offer(&self.memory, 0, &[writable(EVENT_AT, 4)]);
        self.memory
            .write_obj(0xffff_ffffu32, GuestAddress(EVENT_AT))
            .unwrap();
        self.notify(EVENT);
    }

    /// An event that came.
    pub(crate) fn event(&mut self) -> Option<u32> {
        let (_, len) = self.rings[EVENT].take(&self.memory)?;
        assert_eq!(len, 4);
        Some(self.memory.read_obj(GuestAddress(EVENT_AT)).unwrap())
    }

    /// Puts a packet into the transmit queue, without a notification.
    pub(crate) fn post(&mut self, header: &Header, payload: &[u8]) {
        let mut packet = header.encode();
        packet.extend(payload);
        // Cut as no driver of today does, and any may: the header over two, the payload too.
        let middle = (HEADER + payload.len() / 2) as u32;
        let mut cuts = vec![20, HEADER as u32, middle, packet.len() as u32];
        cuts.dedup();
        let mut from = 0;
        let mut chain = Vec::new();
        for to in cuts {
            chain.push(readable(TRANSMIT_AT + u64::from(from), to - from));
            from = to;
        }
        self.memory
            .write_slice(&packet, GuestAddress(TRANSMIT_AT))
            .unwrap();
        self.rings[TRANSMIT].offer(&self.memory, 0, &chain);
    }

    pub(crate) fn notify_transmit(&self) {
        self.notify(TRANSMIT);
    }

    /// Puts any bytes into the transmit queue and says whether they came back.
    pub(crate) fn send_raw(&mut self, bytes: &[u8], announced: u32) -> bool {
        self.memory
            .write_slice(bytes, GuestAddress(TRANSMIT_AT))
            .unwrap();
        self.rings[TRANSMIT].offer(&self.memory, 0, &[readable(TRANSMIT_AT, announced)]);
        self.notify(TRANSMIT);
        self.sent()
    }

    /// Sends a packet as it is, and says whether the device took it.
    pub(crate) fn try_send(&mut self, header: &Header, payload: &[u8]) -> bool {
        self.post(header, payload);
        self.notify(TRANSMIT);
        self.sent()
    }

    /// Whether the device has taken a packet since the last one that it took.
    pub(crate) fn sent(&mut self) -> bool {
        match self.rings[TRANSMIT].take(&self.memory) {
            Some((_, len)) => {
                assert_eq!(len, 0);
                true
            }
            None => false,
        }
    }

    /// Sends a packet whose length is that of `payload`.
    pub(crate) fn send(&mut self, header: Header, payload: &[u8]) {
        let len = payload.len() as u32;
        assert!(self.try_send(&Header { len, ..header }, payload));
    }

    /// A packet that came, whose buffer the device gets again.
    pub(crate) fn receive(&mut self) -> Option<(Header, Vec<u8>)> {
        let packet = self.receive_and_keep()?;
        self.give_back(packet.0);
        Some((packet.1, packet.2))
    }

    /// A packet that came, and the number of its buffer.
    pub(crate) fn receive_and_keep(&mut self) -> Option<(u16, Header, Vec<u8>)> {
        let (head, len) = self.rings[RECEIVE].take(&self.memory)?;
        let mut packet = vec![0; len as usize];
        let at = RECEIVE_AT + RECEIVE_STRIDE * u64::from(head);
        self.memory
            .read_slice(&mut packet, GuestAddress(at))
            .unwrap();
        let header = Header::decode(&packet);
        let payload = packet.split_off(HEADER);
        assert_eq!(payload.len(), header.len as usize);
        Some((head, header, payload))
    }

    /// Whether a packet is there that the guest has not looked at.
    pub(crate) fn has_unread(&self) -> bool {
        self.rings[RECEIVE].has_returned(&self.memory)
    }

    pub(crate) fn give_back(&mut self, head: u16) {
        self.give_buffer(head);
        self.notify(RECEIVE);
    }

    /// The next packet, which must come.
    pub(crate) fn await_packet(&mut self) -> (Header, Vec<u8>) {
        until("a packet", || self.receive())
    }

    /// The next packet, which must be of this operation.
    pub(crate) fn await_op(&mut self, op: u16) -> (Header, Vec<u8>) {
        let (header, payload) = self.await_packet();
        assert_eq!(header.op, op, "{header:?}");
        (header, payload)
    }

    /// The CID in the configuration space.
    pub(crate) fn cid(&self) -> u64 {
        let mut cid = [0; 8];
        self.device.lock().unwrap().read(0x100, &mut cid);
        u64::from_le_bytes(cid)
    }

    pub(crate) fn activate(&self) {
        self.device.lock().unwrap().activate().unwrap();
    }
}

/// Waits until `look` sees `what`.
pub(crate) fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(start.elapsed() < PATIENCE, "{what} never came");
        thread::sleep(Duration::from_micros(200));
    }
}
