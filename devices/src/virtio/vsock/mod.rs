//! The socket device (virtio 1.2 section 5.10): streams between programs of the guest and of its host.
//!
//! The muxer (`muxer.rs`) holds the connections and knows no queue; [`Vsock`] moves its packets through
//! the queues; a [`Backend`] is the host's side of it, of which [`UnixBackend`] with its [`SocketThread`]
//! is the one for Unix sockets. Without a backend the device is there and every connect is refused.
//!
//! A packet is taken from the transmit queue only while there is room for its answer, and a buffer
//! from the receive queue only when there is a packet for it. So nothing is ever held that a saved
//! machine would miss: what is not in the rings is connections, and these are their own machine's.
//!
//! **Connections do not go with a state.** Whoever is restored, a clone above all, has none; its
//! driver is told so by an event (section 5.10.6.7), and finds its own CID. The parent's go on.
//! `docs/vsock.md` has the whole of it.

mod connection;
mod greeting;
pub mod host;
mod muxer;
mod packet;
mod socket_thread;
pub mod unix;

pub use host::{Backend, HostStream, Token};
pub use socket_thread::{SocketThread, UnixVsock};
pub use unix::{UnixBackend, UnixEnd};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use self::muxer::Muxer;
use self::packet::{HEADER_LEN, Header, op};
use crate::virtio::chain::BufferError;
use crate::virtio::refusal::{Refusal, written};
use crate::virtio::{Chain, VirtioDevice, read_config_bytes};
use crate::{Brake, GuestMemory};

/// Device ID of a socket device.
const DEVICE_TYPE: u32 = 19;

/// Section 5.10.2: receive, transmit, and events, of which none but the reset exists.
const QUEUE_SIZES: &[u16] = &[128, 128, 16];
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

/// Most payload of a packet: no more than a guest has credit for.
const MOST_PAYLOAD: usize = connection::TO_HOST;

/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET, a `virtio_vsock_event` of 4 bytes.
const TRANSPORT_RESET: [u8; 4] = 0u32.to_le_bytes();

/// The address of a guest: a number that no other machine of its host has, if anybody is to tell them
/// apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cid(u32);

/// A number that is no guest's CID.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("{0} is no CID of a guest: take one from 3 to 4294967294")]
pub struct NoCid(pub u64);

impl Cid {
    /// A guest's CID: 3 to 2^32 - 2. The others are reserved (section 5.10.4).
    pub fn new(number: u64) -> Result<Cid, NoCid> {
        match u32::try_from(number) {
            Ok(cid) if (3..u32::MAX).contains(&cid) => Ok(Cid(cid)),
            _ => Err(NoCid(number)),
        }
    }

    /// The number.
    pub fn number(self) -> u32 {
        self.0
    }
}

/// A socket device, connected to its host by `B`.
pub struct Vsock<B: Backend> {
    muxer: Muxer<B::Stream>,
    backend: Option<B>,
    /// The driver is to hear that all connections are gone.
    owes_reset: bool,
    /// Empty until the first payload: an idle clone has none.
    payload: Vec<u8>,
}

impl<B: Backend> Vsock<B> {
    /// The device of the guest with this CID. Without a backend nobody can be connected to.
    pub fn new(cid: Cid, backend: Option<B>) -> Vsock<B> {
        Vsock {
            muxer: Muxer::new(u64::from(cid.number())),
            backend,
            owes_reset: false,
            payload: Vec::new(),
        }
    }

    /// Gives the guest another CID, before it runs: after a restore, which brings the CID of the
    /// machine that was saved. All connections end.
    pub fn set_cid(&mut self, cid: Cid) {
        self.muxer.start_over(u64::from(cid.number()));
    }

    /// The guest's CID.
    pub fn cid(&self) -> u64 {
        self.muxer.guest_cid()
    }

    /// The host's side.
    pub fn backend(&self) -> Option<&B> {
        self.backend.as_ref()
    }

    /// A name for a stream that is about to be [admitted](Vsock::admit).
    pub fn new_token(&mut self) -> Token {
        self.muxer.new_token()
    }

    /// Takes a stream that a program of the host has opened, and whose first line says which port of
    /// the guest it wants. `token` is a [new](Vsock::new_token) one. Where there are too many streams
    /// already, this one is closed.
    ///
    /// After this or [`ready`](Vsock::ready),
    /// [`serve_from_outside`](crate::virtio::MmioTransport::serve_from_outside) sends the guest what
    /// there is for it.
    pub fn admit(&mut self, token: Token, stream: B::Stream) {
        self.muxer.admit(token, stream);
    }

    /// A stream that could not be read or written before may be now, or, with `hung_up`, its peer
    /// neither reads nor writes any more. May be called too often, also for a stream that is gone.
    pub fn ready(&mut self, token: Token, hung_up: bool) {
        self.muxer.ready(token, hung_up);
    }

    /// Takes a packet of the guest.
    fn transmit(
        &mut self,
        mut request: Chain,
        memory: &GuestMemory,
        brake: &Brake,
    ) -> Result<(), Refusal> {
        if let Some(fault) = request.fault {
            return Err(Refusal::Chain(fault));
        }
        let mut header = [0; HEADER_LEN];
        request.readable.read(memory, &mut header)?;
        brake.vouch()?;
        let header = Header::decode(&header);
        let len = header.len as usize;
        let payload = match header.op {
            op::RW if len <= MOST_PAYLOAD && len as u64 <= request.readable.len() => {
                if self.payload.len() < len {
                    self.payload.resize(len, 0);
                }
                let payload = &mut self.payload[..len];
                request.readable.read(memory, payload)?;
                brake.vouch()?;
                Some(&*payload)
            }
            _ => None,
        };
        let backend = &mut self.backend;
        self.muxer
            .take(&header, payload, |port, token| match backend {
                Some(backend) => backend.connect(port, token),
                None => Err(std::io::ErrorKind::NotConnected.into()),
            });
        Ok(())
    }

    /// Gives the guest a packet.
    fn receive(&mut self, mut request: Chain, memory: &GuestMemory) -> Result<u32, Refusal> {
        if let Some(fault) = request.fault {
            return Err(Refusal::Chain(fault));
        }
        let room = request.writable.len();
        let Some(room) = room.checked_sub(HEADER_LEN as u64) else {
            return Err(Refusal::Buffers(BufferError::TooShort));
        };
        let room = usize::try_from(room).unwrap_or(usize::MAX);
        let sent = self.muxer.send(room, |header, payload| {
            request.writable.write(memory, header)?;
            request.writable.write(memory, payload)
        })?;
        Ok(sent.unwrap_or(0) as u32)
    }

    /// Tells the guest of the reset that it is owed.
    fn tell_reset(&mut self, mut request: Chain, memory: &GuestMemory) -> Result<u32, Refusal> {
        if let Some(fault) = request.fault {
            return Err(Refusal::Chain(fault));
        }
        request.writable.write(memory, &TRANSPORT_RESET)?;
        self.owes_reset = false;
        Ok(TRANSPORT_RESET.len() as u32)
    }
}

impl<B: Backend> VirtioDevice for Vsock<B> {
    type State = SavedVsock;

    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    /// Section 5.10.4.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.muxer.guest_cid().to_le_bytes(), offset, data);
    }

    fn takes(&self, queue: usize) -> bool {
        match queue {
            RECEIVE => self.muxer.has_packet(),
            TRANSMIT => self.muxer.takes(),
            _ => self.owes_reset,
        }
    }

    fn serve(
        &mut self,
        queue: usize,
        request: Chain,
        _features: u64,
        memory: &GuestMemory,
        brake: &Brake,
    ) -> u32 {
        let served = match queue {
            RECEIVE => self.receive(request, memory),
            TRANSMIT => self.transmit(request, memory, brake).map(|()| 0),
            _ => self.tell_reset(request, memory),
        };
        written("vsock", queue, served)
    }

    fn reset(&mut self) {
        self.muxer.start_over(self.muxer.guest_cid());
        self.owes_reset = false;
    }

    fn save(&self) -> SavedVsock {
        SavedVsock {
            guest_cid: self.muxer.guest_cid(),
        }
    }

    fn restore(&mut self, state: SavedVsock) -> Result<(), String> {
        let cid = Cid::new(state.guest_cid).map_err(|error| error.to_string())?;
        self.set_cid(cid);
        self.owes_reset = true;
        Ok(())
    }
}

/// What a socket device saves. That its driver is owed a reset is not said: whoever is restored is.
#[derive(Debug, Serialize, Deserialize)]
pub struct SavedVsock {
    guest_cid: u64,
}
