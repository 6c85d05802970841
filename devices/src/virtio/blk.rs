//! The block device (virtio 1.2 section 5.2): one disk, one queue.
//!
//! It turns requests into calls of a [`BlockLayer`] and knows nothing of files, overlays or forks.
//! A request that does not make sense gets the status IOERR or UNSUPP; one without room for a
//! status is returned unanswered. Data passes through one buffer of bounded size, so that the
//! layer never sees memory that the guest can change.
//!
//! Guest memory may be missing when it is read, and never come: before each call of the layer the
//! [`Brake`] vouches for what was read until then.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::Bytes;

use crate::block::{BlockLayer, SECTOR};
use crate::brake::Condemned;
use crate::virtio::chain::{BufferError, Buffers};
use crate::virtio::{Chain, VirtioDevice, read_config_bytes};
use crate::{Brake, GuestMemory};

/// Device ID of a block device.
const DEVICE_TYPE: u32 = 2;

/// Size of the only queue.
const QUEUE_SIZE: u16 = 256;

/// Data buffers of a request: a full queue less header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;

/// Length of a request's header.
const HEADER_LEN: usize = 16;

/// Length of a range in a DISCARD or WRITE_ZEROES request.
const RANGE_LEN: u64 = 16;

/// Most ranges of a DISCARD or WRITE_ZEROES request.
const MOST_RANGES: u64 = 16;

/// Most sectors of a range of such a request (8 MiB): on some file systems they have to be written,
/// and a machine that is to stand still waits for the request.
const MOST_RANGE_SECTORS: u32 = 1 << 14;

/// Length of the disk's id, padded with zeros.
const ID_LEN: usize = 20;

/// Most bytes on their way between guest and layer: the host memory that a request can cost.
const BOUNCE_LEN: usize = 128 * 1024;

/// What a block device has done since it was made. Not part of its saved state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlkCounters {
    /// Reads that succeeded.
    pub read_requests: u64,
    /// Bytes that they read.
    pub read_bytes: u64,
    /// Writes that succeeded.
    pub written_requests: u64,
    /// Bytes that they wrote.
    pub written_bytes: u64,
    /// Flushes that succeeded.
    pub flush_requests: u64,
    /// DISCARD and WRITE_ZEROES requests that succeeded.
    pub discard_requests: u64,
    /// Bytes that such requests made read as zero.
    pub discarded_bytes: u64,
    /// Requests that ended with another status than OK, or without one.
    pub failed_requests: u64,
}

/// A disk on a [`BlockLayer`].
pub struct Blk {
    layer: Arc<dyn BlockLayer>,
    id: [u8; ID_LEN],
    counters: BlkCounters,
    /// The layer failed before; that was said once. A guest can have it fail again and again.
    said_failed: bool,
    /// Empty until the first transfer: an idle clone has none.
    bounce: Vec<u8>,
}

impl Blk {
    /// A disk with the content of `layer`; the driver reads `id` by GET_ID, cut to 20 bytes.
    pub fn new(layer: Arc<dyn BlockLayer>, id: &str) -> Blk {
        let mut padded = [0; ID_LEN];
        let len = id.len().min(ID_LEN);
        padded[..len].copy_from_slice(&id.as_bytes()[..len]);
        Blk {
            layer,
            id: padded,
            counters: BlkCounters::default(),
            said_failed: false,
            bounce: Vec::new(),
        }
    }

    /// Puts another layer in place and returns the old one. Nothing is in flight between two
    /// requests, so the caller only has to see to it that the two have the same size and content.
    pub fn swap_layer(&mut self, new: Arc<dyn BlockLayer>) -> Arc<dyn BlockLayer> {
        std::mem::replace(&mut self.layer, new)
    }

    /// The layer in place.
    pub fn layer(&self) -> &Arc<dyn BlockLayer> {
        &self.layer
    }

    /// What was done since the device was made.
    pub fn counters(&self) -> BlkCounters {
        self.counters
    }

    /// Carries a request out and returns how many bytes of data it wrote into `request.writable`.
    fn execute(
        &mut self,
        request: &mut Chain,
        features: u64,
        memory: &GuestMemory,
        brake: &Brake,
    ) -> Result<u32, Refusal> {
        let mut header = [0; HEADER_LEN];
        request.readable.read(memory, &mut header)?;
        brake.vouch()?;
        let kind = u32::from_le_bytes(fixed(&header, 0));
        let sector = u64::from_le_bytes(fixed(&header, 8));
        match kind {
            VIRTIO_BLK_T_IN => self.read(sector, request, memory, brake),
            VIRTIO_BLK_T_OUT => self
                .write(sector, request, memory, brake)?
                .stable(self, features),
            VIRTIO_BLK_T_FLUSH => {
                self.layer.flush()?;
                self.counters.flush_requests += 1;
                Ok(0)
            }
            VIRTIO_BLK_T_GET_ID => {
                request.writable.write(memory, &self.id)?;
                Ok(ID_LEN as u32)
            }
            VIRTIO_BLK_T_DISCARD if !self.layer.read_only() => self
                .discard(&mut request.readable, memory, brake)?
                .stable(self, features),
            VIRTIO_BLK_T_WRITE_ZEROES if !self.layer.read_only() => self
                .write_zeroes(&mut request.readable, memory, brake)?
                .stable(self, features),
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => Err(Refusal::ReadOnly),
            other => Err(Refusal::Unsupported(other)),
        }
    }

    fn read(
        &mut self,
        sector: u64,
        request: &mut Chain,
        memory: &GuestMemory,
        brake: &Brake,
    ) -> Result<u32, Refusal> {
        if !request.readable.is_empty() {
            return Err(Refusal::Shape);
        }
        let range = self.data_range(sector, request.writable.len())?;
        let len = range.end - range.start;
        for part in parts(range) {
            // To write guest memory may wait as well: a machine that is lost needs no further part.
            brake.vouch()?;
            let bounce = bounce(&mut self.bounce, &part);
            self.layer.read_at(part.start, bounce)?;
            request.writable.write(memory, bounce)?;
        }
        self.counters.read_requests += 1;
        self.counters.read_bytes += len;
        Ok(len as u32)
    }

    fn write(
        &mut self,
        sector: u64,
        request: &mut Chain,
        memory: &GuestMemory,
        brake: &Brake,
    ) -> Result<Written, Refusal> {
        if self.layer.read_only() {
            return Err(Refusal::ReadOnly);
        }
        if !request.writable.is_empty() {
            return Err(Refusal::Shape);
        }
        let range = self.data_range(sector, request.readable.len())?;
        let len = range.end - range.start;
        for part in parts(range) {
            let bounce = bounce(&mut self.bounce, &part);
            request.readable.read(memory, bounce)?;
            brake.vouch()?;
            self.layer.write_at(part.start, bounce)?;
        }
        self.counters.written_requests += 1;
        self.counters.written_bytes += len;
        Ok(Written)
    }

    fn discard(
        &mut self,
        ranges: &mut Buffers,
        memory: &GuestMemory,
        brake: &Brake,
    ) -> Result<Written, Refusal> {
        // Section 5.2.6.2: every flag is unsupported here, unmap included.
        let ranges = self.ranges(ranges, memory, 0)?;
        brake.vouch()?;
        for (range, _) in ranges {
            let len = range.end - range.start;
            self.layer.discard(range)?;
            self.counters.discarded_bytes += len;
        }
        self.counters.discard_requests += 1;
        Ok(Written)
    }

    fn write_zeroes(
        &mut self,
        ranges: &mut Buffers,
        memory: &GuestMemory,
        brake: &Brake,
    ) -> Result<Written, Refusal> {
        let unmap = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
        let ranges = self.ranges(ranges, memory, unmap)?;
        brake.vouch()?;
        for (range, flags) in ranges {
            let len = range.end - range.start;
            if flags & unmap != 0 {
                self.layer.discard(range)?;
            } else {
                // Without the flag the driver wants the space to stay allocated.
                self.layer.write_zeroes(range)?;
            }
            self.counters.discarded_bytes += len;
        }
        self.counters.discard_requests += 1;
        Ok(Written)
    }

    /// Reads and checks all ranges of a request before the first is acted on.
    fn ranges(
        &self,
        ranges: &mut Buffers,
        memory: &GuestMemory,
        known_flags: u32,
    ) -> Result<Vec<(Range<u64>, u32)>, Refusal> {
        let len = ranges.len();
        if len == 0 || !len.is_multiple_of(RANGE_LEN) || len / RANGE_LEN > MOST_RANGES {
            return Err(Refusal::Shape);
        }
        let mut checked = Vec::new();
        while !ranges.is_empty() {
            let mut raw = [0; RANGE_LEN as usize];
            ranges.read(memory, &mut raw)?;
            let sector = u64::from_le_bytes(fixed(&raw, 0));
            let [sectors, flags] = [8, 12].map(|at| u32::from_le_bytes(fixed(&raw, at)));
            if flags & !known_flags != 0 {
                return Err(Refusal::Flags(flags));
            }
            if sectors > MOST_RANGE_SECTORS {
                return Err(Refusal::Shape);
            }
            let range = self.range(sector, u64::from(sectors) * SECTOR)?;
            if !range.is_empty() {
                checked.push((range, flags));
            }
        }
        Ok(checked)
    }

    /// The bytes of a read or write, which must be some whole sectors of the disk.
    fn data_range(&self, sector: u64, len: u64) -> Result<Range<u64>, Refusal> {
        if len == 0 || !len.is_multiple_of(SECTOR) {
            return Err(Refusal::Shape);
        }
        self.range(sector, len)
    }

    fn range(&self, sector: u64, len: u64) -> Result<Range<u64>, Refusal> {
        let start = sector.checked_mul(SECTOR).ok_or(Refusal::BeyondEnd)?;
        let end = start.checked_add(len).ok_or(Refusal::BeyondEnd)?;
        if end > self.layer.len() {
            Err(Refusal::BeyondEnd)
        } else {
            Ok(start..end)
        }
    }
}

/// A change of the disk that may still be volatile.
#[must_use]
struct Written;

impl Written {
    /// Section 5.2.6.2: without FLUSH negotiated a change is stable when it is reported.
    fn stable(self, blk: &mut Blk, features: u64) -> Result<u32, Refusal> {
        if features & (1 << VIRTIO_BLK_F_FLUSH) == 0 {
            blk.layer.flush()?;
        }
        Ok(0)
    }
}

impl VirtioDevice for Blk {
    type State = SavedBlk;

    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        let common =
            1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE | 1 << VIRTIO_BLK_F_FLUSH;
        if self.layer.read_only() {
            common | 1 << VIRTIO_BLK_F_RO
        } else {
            common | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        }
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE]
    }

    /// Section 5.2.4. Fields of features that are not offered stay zero.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 60];
        let mut put = |at: usize, value: u32| {
            config[at..at + 4].copy_from_slice(&value.to_le_bytes());
        };
        let sectors = self.layer.len() / SECTOR;
        put(0, sectors as u32);
        put(4, (sectors >> 32) as u32);
        put(12, SEG_MAX);
        put(20, SECTOR as u32);
        if !self.layer.read_only() {
            put(36, MOST_RANGE_SECTORS);
            put(40, MOST_RANGES as u32);
            put(44, 1); // alignment of a discard, in sectors
            put(48, MOST_RANGE_SECTORS);
            put(52, MOST_RANGES as u32);
            put(56, 1); // write_zeroes_may_unmap
        }
        read_config_bytes(&config, offset, data);
    }

    fn serve(
        &mut self,
        _queue: usize,
        mut request: Chain,
        features: u64,
        memory: &GuestMemory,
        brake: &Brake,
    ) -> u32 {
        let Some(status_at) = request.writable.take_last_byte() else {
            tracing::debug!("blk: a request without room for a status is dropped");
            self.counters.failed_requests += 1;
            return 0;
        };
        let done = match request.fault {
            Some(fault) => Err(Refusal::Chain(fault)),
            None => self.execute(&mut request, features, memory, brake),
        };
        let (written, status) = match done {
            Ok(written) => (written, VIRTIO_BLK_S_OK),
            // Whoever condemned the machine says why it ends.
            Err(Refusal::Condemned(_)) => return 0,
            Err(refusal) => {
                self.counters.failed_requests += 1;
                match &refusal {
                    Refusal::Layer(error) if !std::mem::replace(&mut self.said_failed, true) => {
                        let disk = String::from_utf8_lossy(&self.id);
                        let disk = disk.trim_end_matches('\0');
                        tracing::warn!(%error, disk, "blk: the disk failed; it is said once");
                    }
                    refusal => tracing::debug!(%refusal, "blk: a request is refused"),
                }
                (0, refusal.status())
            }
        };
        match memory.write_obj(status as u8, status_at) {
            Ok(()) => written.saturating_add(1),
            Err(_) => 0,
        }
    }

    fn save(&self) -> SavedBlk {
        SavedBlk {
            disk_len: self.layer.len(),
        }
    }

    fn restore(&mut self, state: SavedBlk) -> Result<(), String> {
        if state.disk_len != self.layer.len() {
            return Err(format!(
                "its disk had {} bytes, the one given has {}; give it the disk it was saved with",
                state.disk_len,
                self.layer.len()
            ));
        }
        Ok(())
    }
}

/// What a block device saves: a request is never half done, so only what it relies on.
#[derive(Debug, Serialize, Deserialize)]
pub struct SavedBlk {
    /// Size of the disk in bytes.
    disk_len: u64,
}

/// Why a request does not end with the status OK.
#[derive(Debug, Error)]
enum Refusal {
    #[error(transparent)]
    Chain(crate::virtio::chain::Fault),
    #[error(transparent)]
    Buffers(#[from] BufferError),
    #[error("its buffers do not have the shape of such a request")]
    Shape,
    #[error("it reaches beyond the end of the disk")]
    BeyondEnd,
    #[error("the disk is read-only")]
    ReadOnly,
    #[error("requests of type {0} are not supported")]
    Unsupported(u32),
    #[error("its flags {0:#x} are not supported")]
    Flags(u32),
    #[error(transparent)]
    Condemned(#[from] Condemned),
    #[error("the disk failed: {0}")]
    Layer(#[from] io::Error),
}

impl Refusal {
    fn status(&self) -> u32 {
        match self {
            Refusal::Unsupported(_) | Refusal::Flags(_) => VIRTIO_BLK_S_UNSUPP,
            _ => VIRTIO_BLK_S_IOERR,
        }
    }
}

/// Cuts `range` into pieces that fit into the bounce buffer.
fn parts(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let end = range.end;
    range
        .step_by(BOUNCE_LEN)
        .map(move |at| at..end.min(at + BOUNCE_LEN as u64))
}

/// Room for `part` in the bounce buffer.
fn bounce<'a>(buffer: &'a mut Vec<u8>, part: &Range<u64>) -> &'a mut [u8] {
    let len = (part.end - part.start) as usize;
    if buffer.len() < len {
        buffer.resize(len, 0);
    }
    &mut buffer[..len]
}

/// `N` bytes of `bytes` from `at`, which lie inside it.
fn fixed<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&bytes[at..at + N]);
    field
}
