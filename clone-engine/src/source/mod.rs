//! Where the pages of an image come from while it fills: a [`PageSource`].
//!
//! A source may be the memory of a VM of this process (`live_parent`), an earlier image
//! (`local_image`), a file (`saved_memory`), the process that fills
//! the image ([`crate::worker`]), later another host. Nothing may assume that it is near, fast or alive: what
//! is not at hand ([`PageSource::local`]) is fetched by a thread of its own, with a deadline, and a
//! source that fails costs the clones that needed the page, and nobody else.

pub(crate) mod live_parent;
pub(crate) mod local_image;
pub(crate) mod saved_memory;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use vm_memory::VolatileSlice;

/// Delivers pages of one image: the image's own pages, each the same whenever it is asked for.
///
/// Ranges are file offsets of guest RAM in bytes, multiples of 4096, and do not cross the border
/// between two regions of RAM.
pub trait PageSource: Send + Sync {
    /// What errors call it, such as `VM X.1` or a path.
    fn name(&self) -> String;

    /// Delivers all pages of `ranges` to `sink`, in any order, each whole. It may deliver others as
    /// well. Waits as long as it takes; whoever cannot wait asks for [`local`](Self::local) pages.
    ///
    /// # Errors
    /// After an error some pages may have been delivered; those are good.
    fn fetch(&self, ranges: &[Range<u64>], sink: &mut dyn PageSink) -> Result<(), SourceError>;

    /// Shows the pages of `range` if they lie in this process's memory, for as long as `show` takes,
    /// and says whether they do. What is shown may be written meanwhile: see
    /// [`MemoryImage`](crate::image::MemoryImage) for why that tears nothing. Never waits for
    /// another source.
    fn local(&self, _range: &Range<u64>, _show: &mut dyn FnMut(VolatileSlice<'_>)) -> bool {
        false
    }

    /// Pages that may be asked for soon. Changes nothing but speed.
    fn hint(&self, _ranges: &[Range<u64>]) {}
}

/// Takes what a source delivers.
pub trait PageSink {
    /// Pages with their content: `offset` and the length are multiples of 4096.
    fn pages(&mut self, offset: u64, content: &[u8]) -> Result<(), SourceError>;

    /// Pages that are zero.
    fn zero(&mut self, range: Range<u64>) -> Result<(), SourceError>;

    /// Pages that have been put into the image's file: it is another process that fills the image.
    fn there(&mut self, range: Range<u64>) -> Result<(), SourceError>;
}

/// Stands between a family's images and their sources: to watch, to slow down, to replace.
pub trait Sources: Send + Sync {
    /// What an image takes its pages from, instead of `source`.
    fn of_image(&self, source: Arc<dyn PageSource>) -> Arc<dyn PageSource>;
}

/// Every image takes its pages from where they are.
#[derive(Debug)]
pub struct PlainSources;

impl Sources for PlainSources {
    fn of_image(&self, source: Arc<dyn PageSource>) -> Arc<dyn PageSource> {
        source
    }
}

/// Why pages did not come.
#[derive(Clone, Debug, Error, Serialize, Deserialize)]
pub enum SourceError {
    /// These pages cannot be had, or are not what they were; others can be.
    #[error("{name} cannot deliver the memory at {offset:#x}: {why}")]
    Damaged {
        /// The source.
        name: String,
        /// File offset in guest RAM.
        offset: u64,
        /// What is wrong.
        why: String,
    },
    /// It will not deliver anything any more.
    #[error("{name} delivers no memory any more: {why}")]
    Gone {
        /// The source.
        name: String,
        /// What happened.
        why: String,
    },
    /// It delivered what nobody could have asked for.
    #[error("{name} delivered {len} bytes for {offset:#x}, which are no pages of this memory")]
    Rubbish {
        /// The source.
        name: String,
        /// The offset it named.
        offset: u64,
        /// Bytes delivered.
        len: u64,
    },
    /// The page came and could not be put into the image.
    #[error("the memory at {offset:#x} could not be put into the image: {why}")]
    Insert {
        /// File offset in guest RAM.
        offset: u64,
        /// What the kernel said.
        why: String,
    },
}

impl SourceError {
    /// Whether nothing else can be expected of the source either.
    pub(crate) fn is_final(&self) -> bool {
        matches!(self, SourceError::Gone { .. })
    }
}
