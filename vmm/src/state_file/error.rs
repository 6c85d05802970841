//! What can be wrong with a state file.

use std::io;

use thiserror::Error;

use super::{FORMAT, MAX_FILE_LEN, MAX_SECTION_LEN, MAX_SECTIONS};

/// Why bytes are not a state that can be restored. Offsets count bytes from the start of the file.
#[derive(Debug, Error)]
pub enum StateFileError {
    /// Reading failed.
    #[error("reading the state file failed after {at} bytes")]
    Io {
        /// How many bytes had been read.
        at: usize,
        /// What the reader said.
        source: io::Error,
    },
    /// The first bytes are not those of a state file.
    #[error("not a forkvm state file: it does not begin with \"FORKVM-S\"; check the path")]
    Foreign,
    /// It is the file beside the one that was asked for.
    #[error("this is a forkvm memory file, not a state file: name the file `state` beside it")]
    MemoryFile,
    /// The format is not the one that this program knows.
    #[error(
        "the state file has format {found}, this forkvm reads format {FORMAT}: \
         use the forkvm that wrote it, or a newer one"
    )]
    Format {
        /// Format version in the file.
        found: u16,
    },
    /// The machine is not of this host's architecture.
    #[error(
        "the state file is of architecture {found}, this forkvm runs 1 (x86-64): \
         restore it on a host of its own kind"
    )]
    Architecture {
        /// Number in the file.
        found: u8,
    },
    /// The header's checksum does not fit its bytes.
    #[error(
        "the header of the state file (offset 0, 44 bytes) is damaged: its checksum does not fit; \
         take the file from its source again"
    )]
    Header,
    /// A byte that must be zero in this format is not.
    #[error(
        "the state file sets reserved byte {offset} of its header, which no known forkvm does: \
         use the forkvm that wrote it"
    )]
    Reserved {
        /// Offset of the byte.
        offset: usize,
    },
    /// The header announces more sections than any machine has.
    #[error(
        "the state file announces {count} sections (offset 12), at most {MAX_SECTIONS} are allowed"
    )]
    TooManySections {
        /// The number in the header.
        count: u16,
    },
    /// The header announces an impossible length.
    #[error(
        "the state file announces {len} bytes (offset 16), at most {MAX_FILE_LEN} are allowed \
         and at least 48 are needed"
    )]
    FileLength {
        /// The length in the header.
        len: u64,
    },
    /// The file is shorter than its header says.
    #[error(
        "the state file is cut off: {found} of {expected} bytes are there; \
         take the file from its source again"
    )]
    Truncated {
        /// Length that it should have in bytes.
        expected: u64,
        /// Length that it has.
        found: u64,
    },
    /// Something follows the state.
    #[error("the state file ends at offset {expected}, but more bytes follow: it was appended to")]
    Trailing {
        /// Length that it should have in bytes.
        expected: u64,
    },
    /// A section's fields, or its body, reach beyond the end of the file.
    #[error("state section {section} at offset {offset} reaches beyond the end of the file")]
    SectionTruncated {
        /// Number of the section, and its name if that is still within the file.
        section: SectionPlace,
        /// Where the section starts.
        offset: usize,
    },
    /// A section's name is not UTF-8.
    #[error("the name of state section {section} at offset {offset} is not UTF-8")]
    SectionName {
        /// Number of the section.
        section: SectionPlace,
        /// Where the section starts.
        offset: usize,
    },
    /// A section announces a body that is too long.
    #[error(
        "state section {section} at offset {offset} announces {len} bytes, \
         at most {MAX_SECTION_LEN} are allowed"
    )]
    SectionLength {
        /// Number and name of the section.
        section: SectionPlace,
        /// Where the section starts.
        offset: usize,
        /// Length in its header.
        len: u32,
    },
    /// A section's checksum does not fit its name, version and body.
    #[error(
        "state section {section} at offset {offset} is damaged: its checksum does not fit; \
         take the file from its source again"
    )]
    SectionDamaged {
        /// Number and name of the section.
        section: SectionPlace,
        /// Where the section starts.
        offset: usize,
    },
    /// Two sections have one name.
    #[error("state section {section} at offset {offset} has the name of an earlier one")]
    Duplicate {
        /// Number and name of the second section.
        section: SectionPlace,
        /// Where it starts.
        offset: usize,
    },
    /// Bytes between the last section and the checksum at the end.
    #[error(
        "the last state section ends at offset {offset}, {len} bytes before the checksum of the file"
    )]
    Unclaimed {
        /// First byte that belongs to no section.
        offset: usize,
        /// How many there are.
        len: usize,
    },
    /// Every part is whole, but they are not the parts that were written together.
    #[error(
        "the checksum of the whole state file (offset {offset}) does not fit: sections were \
         exchanged or the checksum is damaged; take the file from its source again"
    )]
    File {
        /// Where the checksum stands.
        offset: usize,
    },
}

/// Which section an error is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SectionPlace {
    /// Number of the section, from 0.
    pub index: u16,
    /// Its name, as far as it could be read.
    pub kind: Option<String>,
}

impl std::fmt::Display for SectionPlace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.kind {
            Some(kind) => write!(f, "{} ({kind:?})", self.index),
            None => write!(f, "{}", self.index),
        }
    }
}
