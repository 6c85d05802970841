//! A block layer that nobody writes any more.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::{BlockLayer, Presence, Storage, refused_write};

/// A read-only view of another layer: what a fork leaves of a disk for its clones to build on.
///
/// It refuses writes made through itself. That nobody writes the layer underneath any more is its
/// owner's promise.
pub struct Frozen(Arc<dyn BlockLayer>);

impl Frozen {
    /// Shows `layer`, read-only.
    pub fn new(layer: Arc<dyn BlockLayer>) -> Frozen {
        Frozen(layer)
    }
}

impl BlockLayer for Frozen {
    fn len(&self) -> u64 {
        self.0.len()
    }

    fn read_only(&self) -> bool {
        true
    }

    fn read_at(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.0.read_at(offset, data)
    }

    fn write_at(&self, _offset: u64, _data: &[u8]) -> io::Result<()> {
        Err(refused_write())
    }

    /// What was written before the freeze may still be volatile.
    fn flush(&self) -> io::Result<()> {
        self.0.flush()
    }

    fn discard(&self, _range: Range<u64>) -> io::Result<()> {
        Err(refused_write())
    }

    fn presence(&self, offset: u64) -> io::Result<Presence> {
        self.0.presence(offset)
    }

    /// A view is no layer of its own.
    fn depth(&self) -> u32 {
        self.0.depth()
    }

    fn storage(&self) -> Storage<'_> {
        self.0.storage()
    }
}
