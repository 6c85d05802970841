//! Where the sectors of a disk are kept: a stack of block layers.
//!
//! A [`BlockLayer`] is a raw file ([`RawFile`]) or a copy-on-write [`Overlay`] over another layer.
//! The virtio-blk device talks to the topmost one and does not know which it is. Layers hold data;
//! they know nothing of virtio, guests or forks.

mod base_mark;
mod commit;
mod durable;
mod foreign;
mod frozen;
mod overlay;
mod presence_map;
mod raw;
mod sparse;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

pub use base_mark::MarkError;
pub use commit::{CommitError, CommitReport, commit};
pub use foreign::{ForeignError, ForeignFile};
pub use frozen::Frozen;
pub use overlay::{HeldError, HeldSectors, Overlay, OverlayError};
pub use presence_map::MapError;
pub use raw::{Access, RawFile, RawFileError};

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

    /// Makes `range` read as zero. A layer that had the space of `range` reserved keeps it so; one
    /// that never has discards.
    fn write_zeroes(&self, range: Range<u64>) -> io::Result<()> {
        self.discard(range)
    }

    /// How many bytes from `offset` on have the same answer to "does this layer itself hold them",
    /// and the answer. A raw file holds all its sectors.
    fn presence(&self, offset: u64) -> io::Result<Presence>;

    /// Layers from here to the lowest one, this one included.
    fn depth(&self) -> u32 {
        1
    }

    /// Where this layer keeps what it holds, for whoever has to find the same content again.
    fn storage(&self) -> Storage<'_> {
        Storage::Unknown
    }
}

/// Answer of [`BlockLayer::storage`].
pub enum Storage<'a> {
    /// The whole disk is in this raw file.
    Raw {
        /// What the file was called when it was opened.
        path: &'a Path,
        /// The open file.
        file: &'a File,
    },
    /// Some sectors are in an overlay, `base` has the others.
    Overlay {
        /// The overlay itself.
        overlay: &'a Overlay,
        /// Path of the overlay's data file; `None` for an overlay in memory.
        path: Option<&'a Path>,
        /// The layer below.
        base: &'a Arc<dyn BlockLayer>,
    },
    /// Where nobody else can find it.
    Unknown,
}

/// Answer of [`BlockLayer::presence`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Presence {
    /// Whether the layer itself holds the bytes; otherwise the layer below answers for them.
    pub present: bool,
    /// Length of the run in bytes, at least one sector, ending at most at the end of the disk.
    pub len: u64,
}

/// Refuses what no layer accepts: a range that is not whole sectors of a disk of `disk_len` bytes.
fn check_range(offset: u64, len: u64, disk_len: u64) -> io::Result<Range<u64>> {
    let end = offset.checked_add(len).filter(|&end| end <= disk_len);
    match end {
        Some(end) if offset.is_multiple_of(SECTOR) && len.is_multiple_of(SECTOR) => Ok(offset..end),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{len} bytes at {offset} are not whole sectors of a disk of {disk_len} bytes"),
        )),
    }
}

/// What a write to a read-only layer gets.
fn refused_write() -> io::Error {
    io::Error::new(io::ErrorKind::ReadOnlyFilesystem, "the disk is read-only")
}
