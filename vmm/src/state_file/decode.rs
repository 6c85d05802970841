//! Bytes to sections. The bytes are hostile until shown to be whole.

use std::io::Read;

use forkvm_devices::{Section, SectionError, Sections};

use super::{
    ARCH_X86_64, FORMAT, HEADER_LEN, MAGIC, MAX_FILE_LEN, MAX_SECTION_LEN, MAX_SECTIONS, SaveId,
    SectionPlace, StateFile, StateFileError, TRAILER_LEN, file_crc,
};
use crate::memory_file;

/// Decodes a whole state file.
///
/// # Errors
/// See [`StateFileError`]: any damage, anything missing or left over, and anything that was written
/// by another program, for another architecture or in another format.
pub fn decode(bytes: &[u8]) -> Result<StateFile, StateFileError> {
    let header = Header::decode(bytes)?;
    match (bytes.len() as u64).cmp(&header.len) {
        std::cmp::Ordering::Less => {
            return Err(StateFileError::Truncated {
                expected: header.len,
                found: bytes.len() as u64,
            });
        }
        std::cmp::Ordering::Greater => {
            return Err(StateFileError::Trailing {
                expected: header.len,
            });
        }
        std::cmp::Ordering::Equal => {}
    }
    let end = bytes.len() - TRAILER_LEN;
    let mut sections = Sections::default();
    let mut at = HEADER_LEN;
    for index in 0..header.sections {
        let (section, next) = decode_section(&bytes[..end], at, index)?;
        sections
            .push(section)
            .map_err(|error| StateFileError::Duplicate {
                section: SectionPlace {
                    index,
                    kind: duplicate_name(error),
                },
                offset: at,
            })?;
        at = next;
    }
    if at != end {
        return Err(StateFileError::Unclaimed {
            offset: at,
            len: end - at,
        });
    }
    // Parts before the whole: an error then names the section.
    if file_crc(&bytes[..end]).to_le_bytes() != bytes[end..] {
        return Err(StateFileError::File { offset: end });
    }
    Ok(StateFile {
        save: header.save,
        sections,
    })
}

/// Reads a state file to its end and decodes it. The stream has to end where the state ends.
///
/// # Errors
/// As [`decode`], and what the stream says.
pub fn read(mut stream: impl Read) -> Result<StateFile, StateFileError> {
    let mut bytes = Vec::new();
    read_up_to(&mut stream, &mut bytes, HEADER_LEN)?;
    let header = Header::decode(&bytes)?;
    // One byte more than announced, so that an appended file is noticed. The buffer grows with
    // what arrives, not with what is announced.
    let rest = header.len as usize - bytes.len() + 1;
    read_up_to(&mut stream, &mut bytes, rest)?;
    decode(&bytes)
}

fn read_up_to(
    stream: &mut impl Read,
    bytes: &mut Vec<u8>,
    len: usize,
) -> Result<(), StateFileError> {
    match stream.take(len as u64).read_to_end(bytes) {
        Ok(_) => Ok(()),
        Err(source) => Err(StateFileError::Io {
            at: bytes.len(),
            source,
        }),
    }
}

/// What the header says, within the limits.
struct Header {
    sections: u16,
    /// Length of the file, at most [`MAX_FILE_LEN`].
    len: u64,
    save: Option<SaveId>,
}

impl Header {
    /// Magic, format and architecture come first: they stay where they are in every format, so that
    /// a newer or foreign file is named as such and not as damaged.
    fn decode(bytes: &[u8]) -> Result<Header, StateFileError> {
        let magic = &bytes[..bytes.len().min(MAGIC.len())];
        if magic == memory_file::MAGIC {
            return Err(StateFileError::MemoryFile);
        }
        if !MAGIC.starts_with(magic) {
            return Err(StateFileError::Foreign);
        }
        let mut fields = Fields {
            bytes,
            at: MAGIC.len(),
        };
        let truncated = || StateFileError::Truncated {
            expected: (HEADER_LEN + TRAILER_LEN) as u64,
            found: bytes.len() as u64,
        };
        let format = u16::from_le_bytes(fields.take().ok_or_else(truncated)?);
        if format != FORMAT {
            return Err(StateFileError::Format { found: format });
        }
        let [arch] = fields.take().ok_or_else(truncated)?;
        if arch != ARCH_X86_64 {
            return Err(StateFileError::Architecture { found: arch });
        }
        let [reserved] = fields.take().ok_or_else(truncated)?;
        let sections = u16::from_le_bytes(fields.take().ok_or_else(truncated)?);
        let reserved_word: [u8; 2] = fields.take().ok_or_else(truncated)?;
        let len = u64::from_le_bytes(fields.take().ok_or_else(truncated)?);
        let save = SaveId::from_bytes(fields.take().ok_or_else(truncated)?);
        let covered = fields.at;
        let crc = u32::from_le_bytes(fields.take().ok_or_else(truncated)?);
        if crc32fast::hash(&bytes[..covered]) != crc {
            return Err(StateFileError::Header);
        }
        if reserved != 0 {
            return Err(StateFileError::Reserved { offset: 11 });
        }
        if reserved_word != [0; 2] {
            return Err(StateFileError::Reserved { offset: 14 });
        }
        if usize::from(sections) > MAX_SECTIONS {
            return Err(StateFileError::TooManySections { count: sections });
        }
        if !((HEADER_LEN + TRAILER_LEN) as u64..=MAX_FILE_LEN as u64).contains(&len) {
            return Err(StateFileError::FileLength { len });
        }
        Ok(Header {
            sections,
            len,
            save,
        })
    }
}

/// Decodes the section at `start`; returns it and where the next one starts.
fn decode_section(
    bytes: &[u8],
    start: usize,
    index: u16,
) -> Result<(Section, usize), StateFileError> {
    let mut place = SectionPlace { index, kind: None };
    let truncated = |section: &SectionPlace| StateFileError::SectionTruncated {
        section: section.clone(),
        offset: start,
    };
    let mut fields = Fields { bytes, at: start };
    let [name_len] = fields.take().ok_or_else(|| truncated(&place))?;
    let name = fields
        .slice(usize::from(name_len))
        .ok_or_else(|| truncated(&place))?;
    let kind = match std::str::from_utf8(name) {
        Ok(kind) => kind.to_owned(),
        Err(_) => {
            return Err(StateFileError::SectionName {
                section: place,
                offset: start,
            });
        }
    };
    place.kind = Some(kind.clone());
    let version = u16::from_le_bytes(fields.take().ok_or_else(|| truncated(&place))?);
    let len = u32::from_le_bytes(fields.take().ok_or_else(|| truncated(&place))?);
    if len as usize > MAX_SECTION_LEN {
        return Err(StateFileError::SectionLength {
            section: place,
            offset: start,
            len,
        });
    }
    let covered = start..fields.at;
    let crc = u32::from_le_bytes(fields.take().ok_or_else(|| truncated(&place))?);
    let body = fields
        .slice(len as usize)
        .ok_or_else(|| truncated(&place))?;
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&bytes[covered]);
    hasher.update(body);
    if hasher.finalize() != crc {
        return Err(StateFileError::SectionDamaged {
            section: place,
            offset: start,
        });
    }
    Ok((
        Section {
            kind,
            version,
            body: body.to_vec(),
        },
        fields.at,
    ))
}

/// The one way in which adding a section to a list fails is that its name is taken.
fn duplicate_name(error: SectionError) -> Option<String> {
    match error {
        SectionError::Duplicate { kind } => Some(kind),
        _ => None,
    }
}

/// Walks over fields; `None` when the bytes end first.
struct Fields<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Fields<'a> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.slice(N)?.try_into().ok()
    }

    fn slice(&mut self, len: usize) -> Option<&'a [u8]> {
        let end = self.at.checked_add(len)?;
        let slice = self.bytes.get(self.at..end)?;
        self.at = end;
        Some(slice)
    }
}
