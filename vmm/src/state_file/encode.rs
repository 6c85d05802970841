//! Sections to bytes.

use forkvm_devices::Sections;
use thiserror::Error;

use super::{
    ARCH_X86_64, FORMAT, HEADER_LEN, MAGIC, MAX_FILE_LEN, MAX_SECTION_LEN, MAX_SECTIONS, SaveId,
    TRAILER_LEN, file_crc,
};

/// Encodes `sections` as a state file; `save` is the mark of the memory file that belongs to it.
///
/// The same input always gives the same bytes.
///
/// # Errors
/// The limits of the format: [`MAX_SECTIONS`], names of 255 bytes, [`MAX_SECTION_LEN`] and
/// [`MAX_FILE_LEN`].
pub fn encode(sections: &Sections, save: Option<SaveId>) -> Result<Vec<u8>, EncodeError> {
    let (count, len) = measure(sections)?;
    let mut bytes = Vec::with_capacity(len);
    bytes.extend(MAGIC);
    bytes.extend(FORMAT.to_le_bytes());
    bytes.push(ARCH_X86_64);
    bytes.push(0);
    bytes.extend(count.to_le_bytes());
    bytes.extend([0; 2]);
    bytes.extend((len as u64).to_le_bytes());
    bytes.extend(save.map_or([0; 16], SaveId::to_bytes));
    let header_crc = crc32fast::hash(&bytes);
    bytes.extend(header_crc.to_le_bytes());
    for section in sections.iter() {
        let start = bytes.len();
        // `measure` has held the lengths to less than their fields can say.
        bytes.push(section.kind.len() as u8);
        bytes.extend(section.kind.as_bytes());
        bytes.extend(section.version.to_le_bytes());
        bytes.extend((section.body.len() as u32).to_le_bytes());
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&bytes[start..]);
        hasher.update(&section.body);
        bytes.extend(hasher.finalize().to_le_bytes());
        bytes.extend(&section.body);
    }
    let file_crc = file_crc(&bytes);
    bytes.extend(file_crc.to_le_bytes());
    Ok(bytes)
}

/// Number of sections and length of the file, when both are within the limits.
fn measure(sections: &Sections) -> Result<(u16, usize), EncodeError> {
    let count = sections.iter().len();
    if count > MAX_SECTIONS {
        return Err(EncodeError::TooManySections { count });
    }
    let mut len = HEADER_LEN + TRAILER_LEN;
    for section in sections.iter() {
        let kind = || section.kind.clone();
        if section.kind.len() > usize::from(u8::MAX) {
            return Err(EncodeError::NameTooLong { kind: kind() });
        }
        if section.body.len() > MAX_SECTION_LEN {
            return Err(EncodeError::SectionTooLong {
                kind: kind(),
                len: section.body.len(),
            });
        }
        len += 1 + section.kind.len() + 2 + 4 + 4 + section.body.len();
    }
    if len > MAX_FILE_LEN {
        return Err(EncodeError::FileTooLong { len });
    }
    // MAX_SECTIONS is far below the range of u16.
    Ok((count as u16, len))
}

/// Why a state cannot be written as a state file.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum EncodeError {
    /// More sections than the format allows.
    #[error("the state has {count} sections, a state file holds at most {MAX_SECTIONS}")]
    TooManySections {
        /// How many there are.
        count: usize,
    },
    /// A section's name does not fit.
    #[error("the name of state section {kind:?} is longer than 255 bytes")]
    NameTooLong {
        /// The name.
        kind: String,
    },
    /// A section's body is too long.
    #[error(
        "state section {kind:?} has {len} bytes, a state file takes at most {MAX_SECTION_LEN}: \
         bulk data belongs into a file of its own"
    )]
    SectionTooLong {
        /// Name of the section.
        kind: String,
        /// Length of its body in bytes.
        len: usize,
    },
    /// All sections together are too long.
    #[error("the state file would have {len} bytes, at most {MAX_FILE_LEN} are allowed")]
    FileTooLong {
        /// Length in bytes.
        len: usize,
    },
}
