//! Where a guest leaves text for its host: a disk with a header in its first sector.
//!
//! The header is [`MAGIC`], then two 64-bit little-endian numbers: the length of the text in bytes
//! and the number of records in it. It is written last, so a disk without it holds no whole answer.

/// First bytes of the header sector.
pub const MAGIC: [u8; 8] = *b"FKVMREC1";

/// Sector of the header.
pub const HEADER_SECTOR: u64 = 0;

/// Offset in the header of the text's length.
pub const LENGTH_OFFSET: usize = 8;

/// Offset in the header of the number of records.
pub const COUNT_OFFSET: usize = 16;

/// Sector of the text's first byte.
pub const TEXT_SECTOR: u64 = 8;
