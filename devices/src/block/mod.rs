//! Where the sectors of a disk are kept: a stack of block layers.
//!
//! A [`BlockLayer`] is a raw file ([`RawFile`]) or a copy-on-write [`Overlay`] over another layer.
//! The virtio-blk device talks to the topmost one and does not know which it is. Layers hold data;
//! they know nothing of virtio, guests or forks.

use std::io;
use std::ops::Range;

/// Bytes of a sector: the unit of every offset and length below.
pub const SECTOR: u64 = 512;

/// A disk's content, or a part of it over another.
///
/// Offsets and lengths are in bytes and multiples of [`SECTOR`]; anything else, and anything beyond
/// [`len`](BlockLayer::len), is an `InvalidInput` error that changes nothing. A layer may be used
/// by several threads at once; overlapping concurrent accesses see some order of whole sectors.
pub trait BlockLayer: Send + Sync {
    /// Size of the disk in bytes.
    fn len(&self) -> u64;

    /// Whether the disk has no sector.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether writes are refused (`ReadOnlyFilesystem`).
    fn read_only(&self) -> bool;

    /// Fills `data` from `offset`.
    fn read_at(&self, offset: u64, data: &mut [u8]) -> io::Result<()>;

    /// Writes `data` at `offset`.
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Returns once every write before it would survive the host's power loss (for layers that are
    /// kept in memory: at once).
    fn flush(&self) -> io::Result<()>;

    /// Makes `range` read as zero and gives its space back where the layer can.
    fn discard(&self, range: Range<u64>) -> io::Result<()>;

    /// How many bytes from `offset` on have the same answer to "does this layer itself hold them",
    /// and the answer. A raw file holds all its sectors.
    fn presence(&self, offset: u64) -> io::Result<Presence>;
}

/// Answer of [`BlockLayer::presence`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Presence {
    /// Whether the layer itself holds the bytes; otherwise the layer below answers for them.
    pub present: bool,
    /// Length of the run in bytes, at least one sector, ending at most at the end of the disk.
    pub len: u64,
}
