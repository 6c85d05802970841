//! Guest memory in a file beside the machine's state, with a checksum per 64 KiB.
//!
//! A memory file is sparse: the byte at memory offset `x` stands at file offset `data_start + x`,
//! and every 4 KiB page that is zero is a hole. (A memory offset counts in the file that backs the
//! guest's RAM; the `memory` section of the state says at which guest-physical address it lies.)
//! So one chunk is found without an index, can be checked on its own when it is first touched, and
//! the file can be mapped.
//!
//! [`write()`] makes one from a [`MemorySource`]; [`MemoryFile`] reads one. Both keep one chunk in
//! memory, whatever the size of the guest. They know nothing of KVM, of mappings or of paths: they
//! are given open files. Called by [`saved_machine`](crate::saved_machine).
//!
//! The format, byte by byte and with its reasons, is in `docs/state-format.md`.

mod chunks;
mod error;
mod header;
mod read;
mod sparse;
mod write;

pub use error::{MemoryFault, MemoryFileError};
pub use read::MemoryFile;
pub use sparse::MemorySource;
pub(crate) use sparse::seek;
pub use write::{Written, write};

/// Format version that is written and read.
pub const FORMAT: u16 = 1;

/// Bytes of memory under one checksum.
pub const CHUNK: usize = 64 << 10;

/// Bytes of a page: the unit in which zeros are left out.
pub const PAGE: usize = 4096;

/// Most guest memory in one file, in bytes: 1 TiB, for which the table of checksums is 128 MiB.
pub const MAX_LEN: u64 = 1 << 40;

/// First bytes of a memory file.
pub(crate) const MAGIC: [u8; 8] = *b"FORKVM-M";

/// How far a pass over guest memory has come, in bytes of guest memory; holes count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes that are behind.
    pub done: u64,
    /// All bytes.
    pub total: u64,
}
