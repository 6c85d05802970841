//! Where an image's pages are: a memfd, and while it fills the engine's own window on it.
//!
//! The descriptor that could write and the window are private to this module. A page enters a published
//! image in exactly one function, [`Store::insert`]: UFFDIO_COPY into the window, where the first one wins
//! and a page is never seen half-written. Everybody else, other processes too, has the file opened anew for
//! reading only, and maps it privately or reads it. The file of an image that was whole from the start
//! is whoever's it was, until it is sealed.
#![allow(unsafe_code)] // The source of a page is given by address.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, PoisonError, RwLock};

use forkvm_vmm::memory::{self, MemoryError, Window};
use thiserror::Error;

use crate::userfault::{Userfault, UserfaultError, Watch};

/// See the module's text.
#[derive(Debug)]
pub(super) struct Store {
    file: Arc<File>,
    /// `None` once no page enters any more.
    entry: RwLock<Option<Entry>>,
}

/// Where pages come in. The window is watched for missing pages, which is what UFFDIO_COPY asks of a range. Nobody
/// ever faults there.
#[derive(Debug)]
struct Entry {
    userfault: Userfault,
    window: Window,
    /// The one descriptor that is open for writing, which the kernel refuses all the same; it takes one to seal.
    writable: File,
}

impl Store {
    /// A file that is whole.
    pub(super) fn whole(file: Arc<File>) -> Store {
        Store {
            file,
            entry: RwLock::new(None),
        }
    }

    /// An empty file of `len` bytes that pages can enter, by [`Store::insert`] only: the kernel
    /// refuses writes and new writable mappings from here on.
    pub(super) fn empty(len: u64) -> Result<Store, StoreError> {
        let writable = memory::memfd(c"forkvm-image", len)?;
        let window = Window::new(&writable, len)?;
        let userfault = Userfault::open()?;
        let range = window.address()..window.address() + len;
        userfault.register(&range, Watch::Missing)?;
        memory::seal(&writable, libc::F_SEAL_FUTURE_WRITE)?;
        let entry = Entry {
            userfault,
            window,
            writable,
        };
        Ok(Store {
            file: Arc::new(read_only(&entry.writable)?),
            entry: RwLock::new(Some(entry)),
        })
    }

    /// Puts the bytes at `from` into the file at `range`, where no page is yet: the first one wins.
    /// `new` hears of what came in. Nothing happens once the store is closed.
    ///
    /// # Safety
    /// As [`Userfault::copy`].
    pub(super) unsafe fn insert(
        &self,
        range: &Range<u64>,
        from: *const u8,
        mut new: impl FnMut(Range<u64>),
    ) -> Result<(), UserfaultError> {
        let entry = self.entry.read().unwrap_or_else(PoisonError::into_inner);
        let Some(Entry {
            userfault, window, ..
        }) = &*entry
        else {
            return Ok(());
        };
        let installed = |part: Range<u64>| new(range.start + part.start..range.start + part.end);
        let to = window.address() + range.start;
        // SAFETY: passed on to the caller.
        unsafe { userfault.copy(from, to, range.end - range.start, installed) }
    }

    /// Nothing enters any more, and the kernel proves it (F_SEAL_WRITE): EBUSY when somebody still
    /// maps the file writable. Walks the whole image: not for a pause.
    pub(super) fn close(&self) -> Result<(), MemoryError> {
        let entry = self
            .entry
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        match entry {
            Some(Entry {
                userfault,
                window,
                writable,
            }) => {
                drop((userfault, window));
                memory::seal(&writable, libc::F_SEAL_WRITE)
            }
            None => memory::seal(&self.file, libc::F_SEAL_WRITE),
        }
    }

    /// Reads pages that are there. Unlike an access by a mapping, this cannot populate a hole.
    pub(super) fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(into, offset)
    }

    /// The file, to be mapped privately.
    pub(super) fn file(&self) -> &Arc<File> {
        &self.file
    }
}

/// The same file, opened anew: what it can be used for is not that of `file`.
fn read_only(file: &File) -> Result<File, StoreError> {
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).map_err(StoreError::ReadOnly)
}

/// Why an image cannot be had.
#[derive(Debug, Error)]
pub enum StoreError {
    /// A memfd, a mapping or a seal was refused.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// No userfaultfd.
    #[error(transparent)]
    Userfault(#[from] UserfaultError),
    /// A file could not be opened a second time.
    #[error("opening the file of an image for reading failed; is /proc mounted?")]
    ReadOnly(#[source] io::Error),
}

#[cfg(test)]
impl Store {
    /// The descriptor that is open for writing, while pages can enter.
    pub(super) fn writable(&self) -> Option<File> {
        let entry = self.entry.read().unwrap();
        Some(entry.as_ref()?.writable.try_clone().unwrap())
    }
}
