//! The header and the chunk table as bytes.

use super::chunks::{self, Entry};
use super::{CHUNK, FORMAT, MAGIC, MAX_LEN, MemoryFault, PAGE};
use crate::state_file::SaveId;

/// Length of the header in bytes; the table follows.
pub(super) const HEADER_LEN: usize = 48;

/// Length of a table entry in bytes.
pub(super) const ENTRY_LEN: usize = 8;

/// What the header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// Bytes of guest memory.
    pub(super) memory_len: u64,
    /// The save that it is part of.
    pub(super) save: SaveId,
    /// CRC-32 of the table.
    pub(super) table_crc: u32,
}

/// Whether memory of `len` bytes can be saved.
pub(super) fn check_memory_len(len: u64) -> Result<(), MemoryFault> {
    if len == 0 || len > MAX_LEN || !len.is_multiple_of(PAGE as u64) {
        return Err(MemoryFault::Length { len });
    }
    Ok(())
}

/// Bytes of the chunk table for `memory_len` bytes of memory.
pub(super) fn table_len(memory_len: u64) -> u64 {
    chunks::count(memory_len) * ENTRY_LEN as u64
}

/// File offset of the first byte of memory: the first multiple of 64 KiB after the table.
pub(super) fn data_start(memory_len: u64) -> u64 {
    (HEADER_LEN as u64 + table_len(memory_len)).next_multiple_of(CHUNK as u64)
}

impl Header {
    /// The header as it stands in the file.
    pub(super) fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&FORMAT.to_le_bytes());
        bytes[12..16].copy_from_slice(&(CHUNK as u32).to_le_bytes());
        bytes[16..24].copy_from_slice(&self.memory_len.to_le_bytes());
        bytes[24..40].copy_from_slice(&self.save.to_bytes());
        bytes[40..44].copy_from_slice(&self.table_crc.to_le_bytes());
        let crc = crc32fast::hash(&bytes[..44]);
        bytes[44..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads a header. Magic and format come first: they stay where they are in every format, so
    /// that a newer or foreign file is named as such and not as damaged.
    pub(super) fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Header, MemoryFault> {
        if bytes.starts_with(&crate::state_file::MAGIC) {
            return Err(MemoryFault::StateFile);
        }
        if *bytes == [0; HEADER_LEN] {
            return Err(MemoryFault::Unfinished);
        }
        if !bytes.starts_with(&MAGIC) {
            return Err(MemoryFault::Foreign);
        }
        let format = u16::from_le_bytes(field(bytes, 8));
        if format != FORMAT {
            return Err(MemoryFault::Format { found: format });
        }
        if crc32fast::hash(&bytes[..44]) != u32::from_le_bytes(field(bytes, 44)) {
            return Err(MemoryFault::Header);
        }
        let reserved = u16::from_le_bytes(field(bytes, 10));
        if reserved != 0 {
            return Err(MemoryFault::HeaderField {
                field: "reserved",
                found: reserved.into(),
            });
        }
        let chunk = u32::from_le_bytes(field(bytes, 12));
        if chunk != CHUNK as u32 {
            return Err(MemoryFault::HeaderField {
                field: "chunk size",
                found: chunk.into(),
            });
        }
        let memory_len = u64::from_le_bytes(field(bytes, 16));
        check_memory_len(memory_len)?;
        let save = SaveId::from_bytes(field(bytes, 24)).ok_or(MemoryFault::HeaderField {
            field: "save id",
            found: 0,
        })?;
        let table_crc = u32::from_le_bytes(field(bytes, 40));
        Ok(Header {
            memory_len,
            save,
            table_crc,
        })
    }
}

/// The field of `N` bytes at `at`, which lies within the header.
fn field<const N: usize>(bytes: &[u8; HEADER_LEN], at: usize) -> [u8; N] {
    std::array::from_fn(|index| bytes[at + index])
}

/// The table as it stands in the file.
pub(super) fn encode_table(table: &[Entry]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(table.len() * ENTRY_LEN);
    for entry in table {
        bytes.extend(entry.pages.to_le_bytes());
        bytes.extend([0; 2]);
        bytes.extend(entry.crc.to_le_bytes());
    }
    bytes
}

/// Reads the table for `memory_len` bytes of memory, whose checksum has been looked at.
pub(super) fn decode_table(bytes: &[u8], memory_len: u64) -> Result<Vec<Entry>, MemoryFault> {
    let (entries, _) = bytes.as_chunks::<ENTRY_LEN>();
    let decode = |(chunk, &[a, b, reserved_a, reserved_b, crc @ ..]): (usize, &[u8; ENTRY_LEN])| {
        let entry = Entry {
            pages: u16::from_le_bytes([a, b]),
            crc: u32::from_le_bytes(crc),
        };
        let chunk = chunk as u64;
        let whole = [reserved_a, reserved_b] == [0; 2];
        if whole && entry.fits(chunks::len_of(chunk, memory_len)) {
            Ok(entry)
        } else {
            Err(MemoryFault::TableEntry { chunk })
        }
    };
    entries.iter().enumerate().map(decode).collect()
}
