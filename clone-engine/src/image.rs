//! Memory images: the guest memory of one instant, shared by all clones of it.
//!
//! An [`ImageBuilder`] is an image that no VM maps yet; it is filled and then consumed by
//! [`ImageBuilder::publish`]. From then on it is a [`MemoryImage`], which this crate maps privately
//! only, and [`MemoryImage::seal`] has the kernel refuse every other way to write to it. Every image here is complete: a page that is not in it
//! was a hole at the freeze and reads as zero. It is freed with its last user.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use forkvm_vmm::memory::{self, MemoryError, Ram};

/// An image before any VM maps it.
#[derive(Debug)]
pub struct ImageBuilder {
    file: Arc<File>,
}

impl ImageBuilder {
    /// An image that is all holes, for RAM of `len` bytes.
    pub fn empty(len: u64) -> Result<ImageBuilder, MemoryError> {
        Ok(ImageBuilder {
            file: Arc::new(memory::memfd(c"forkvm-image", len)?),
        })
    }

    /// Takes a memfd that holds the whole memory already: the one that a VM has mapped until now.
    pub fn adopt(file: Arc<File>) -> ImageBuilder {
        ImageBuilder { file }
    }

    /// Copies the populated pages of a paused VM into it. Returns the bytes copied.
    pub fn fill(&self, ram: &Ram) -> Result<u64, MemoryError> {
        ram.copy_populated(&self.file)
    }

    /// Bytes of memory that it holds; the rest is holes.
    pub fn populated(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.blocks() * 512)
    }

    /// Ends the building.
    pub fn publish(self) -> Arc<MemoryImage> {
        Arc::new(MemoryImage { file: self.file })
    }
}

/// An immutable, complete memory image.
#[derive(Debug)]
pub struct MemoryImage {
    file: Arc<File>,
}

impl MemoryImage {
    /// Proves that nothing can write to it any more (F_SEAL_WRITE). Fails with EBUSY while somebody
    /// still maps it shared and writable: a parent that was stopped and not yet torn down, or a
    /// stray writer. Not for the parent's pause: it walks the whole image.
    pub fn seal(&self) -> Result<(), MemoryError> {
        memory::seal(&self.file, libc::F_SEAL_WRITE)
    }

    /// The file, to be mapped privately.
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }
}
