//! How a machine's [`Sections`] become bytes, and bytes become sections again.
//!
//! The container knows names, versions and checksums; what is in a section is its owner's concern.
//! Guest memory is never in here: it stands beside the state, in a
//! [`memory_file`](crate::memory_file), and a [`SaveId`] in both says that they belong together.
//! Called by [`saved_machine`](crate::saved_machine), and by whoever sends a state elsewhere.
//!
//! The format, byte by byte and with its reasons, is in `docs/state-format.md`. A state file comes
//! from outside: nothing in it is believed before its checksum and its bounds have been looked at,
//! and no length in it makes the reader allocate more than has arrived.

mod decode;
mod encode;
mod error;
mod save_id;

use forkvm_devices::Sections;

pub use decode::{decode, read};
pub use encode::{EncodeError, encode};
pub use error::{SectionPlace, StateFileError};
pub use save_id::SaveId;

/// Format version that is written and read.
pub const FORMAT: u16 = 1;

/// Most sections in a file. A machine of 16 vCPUs and all devices has fewer than 100.
pub const MAX_SECTIONS: usize = 4096;

/// Longest section body in bytes.
pub const MAX_SECTION_LEN: usize = 64 << 20;

/// Longest state file in bytes.
pub const MAX_FILE_LEN: usize = 256 << 20;

/// What a state file holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateFile {
    /// The save that this state is part of; `None` for a state without a memory file.
    pub save: Option<SaveId>,
    /// The state, in the order in which it was saved.
    pub sections: Sections,
}

/// First bytes of a state file.
pub(crate) const MAGIC: [u8; 8] = *b"FORKVM-S";

/// Architecture of the machine whose state it is: x86-64.
const ARCH_X86_64: u8 = 1;

/// Length of the header in bytes; its own checksum is the last four of them.
const HEADER_LEN: usize = 44;

/// Length in bytes of the checksum over all, which ends the file.
const TRAILER_LEN: usize = 4;

/// The checksum that ends a file whose other bytes are `bytes`, at least a header.
///
/// The header's own checksum is left out: the CRC of a message followed by its CRC is one constant,
/// so with it any header would do.
fn file_crc(bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&bytes[..HEADER_LEN - 4]);
    hasher.update(&bytes[HEADER_LEN..]);
    hasher.finalize()
}
