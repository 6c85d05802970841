//! What can be wrong with a memory file, or while one is made.

use std::io;

use thiserror::Error;

use super::{CHUNK, FORMAT, MAX_LEN, PAGE};
use crate::state_file::SaveId;

/// A [`MemoryFault`], and the file in which it was found.
#[derive(Debug, Error)]
#[error("{file}: {fault}")]
pub struct MemoryFileError {
    /// What the caller calls the file; a descriptor has no name of its own.
    pub file: String,
    /// What is wrong.
    #[source]
    pub fault: MemoryFault,
}

/// Why guest memory cannot be read from, or written to, a memory file.
///
/// Memory offsets count in the file that backs the guest's RAM, file offsets in the memory file.
#[derive(Debug, Error)]
pub enum MemoryFault {
    /// A system call on the memory file failed.
    #[error("cannot {what} at file offset {offset:#x}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Where, in the memory file.
        offset: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// The guest's memory could not be read.
    #[error("cannot read the guest's memory at memory offset {offset:#x}")]
    Source {
        /// Where, in guest memory.
        offset: u64,
        /// What its owner said.
        source: io::Error,
    },
    /// The guest's memory could not be written.
    #[error("cannot write the guest's memory at memory offset {offset:#x}")]
    Target {
        /// Where, in guest memory.
        offset: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// The source of memory announced data outside of what it was asked for.
    #[error(
        "the guest's memory says that data after memory offset {asked:#x} is at \
         {start:#x}..{end:#x}: its source is at fault"
    )]
    Extent {
        /// From where on data was asked for.
        asked: u64,
        /// Start of the answer.
        start: u64,
        /// End of the answer.
        end: u64,
    },
    /// Guest memory of a size that a memory file cannot hold.
    #[error(
        "guest memory of {len} bytes: it has to be a multiple of {PAGE}, up to {MAX_LEN}, not 0"
    )]
    Length {
        /// The size in bytes.
        len: u64,
    },
    /// The file to write to has content, which would show through the holes.
    #[error("the file to save memory to has {len} bytes already: an empty one is needed")]
    NotEmpty {
        /// Its length in bytes.
        len: u64,
    },
    /// The memory to load into has content, which would stay where the file has zeros.
    #[error(
        "the memory to load into holds data at memory offset {offset:#x}: fresh memory is needed"
    )]
    TargetNotEmpty {
        /// The first data.
        offset: u64,
    },
    /// The memory to load into has another size.
    #[error("the memory to load into has {found} bytes, the file holds {expected}")]
    TargetLength {
        /// Bytes of memory in the file.
        expected: u64,
        /// Bytes of the target.
        found: u64,
    },
    /// The first bytes are not those of a memory file.
    #[error("not a forkvm memory file: it does not begin with \"FORKVM-M\"; check the path")]
    Foreign,
    /// It is the file beside the one that was asked for.
    #[error("this is a forkvm state file, not a memory file: name the file `memory` beside it")]
    StateFile,
    /// The file was never finished: its header was not written.
    #[error("the memory file was never finished: its header is empty; save the machine again")]
    Unfinished,
    /// The format is not the one that this program knows.
    #[error(
        "the memory file has format {found}, this forkvm reads format {FORMAT}: \
         use the forkvm that wrote it, or a newer one"
    )]
    Format {
        /// Format version in the file.
        found: u16,
    },
    /// The header's checksum does not fit its bytes.
    #[error(
        "the header of the memory file (file offset 0, 48 bytes) is damaged: its checksum does \
         not fit; take the file from its source again"
    )]
    Header,
    /// The header says something that no known forkvm writes.
    #[error("the memory file's header has {field} = {found}, which this forkvm does not know")]
    HeaderField {
        /// Which field.
        field: &'static str,
        /// Its value.
        found: u64,
    },
    /// The table of checksums does not fit its own checksum.
    #[error(
        "the chunk table of the memory file (file offset 48, {len} bytes) is damaged: its checksum \
         does not fit; take the file from its source again"
    )]
    Table {
        /// Length of the table in bytes.
        len: u64,
    },
    /// An entry of the table contradicts itself.
    #[error(
        "the chunk table of the memory file contradicts itself at chunk {chunk}: it was not written by forkvm"
    )]
    TableEntry {
        /// Number of the chunk.
        chunk: u64,
    },
    /// Bytes that have to be zero are not.
    #[error(
        "the memory file has data between its chunk table and its memory, at file offset {offset:#x}"
    )]
    Padding {
        /// The first such byte.
        offset: u64,
    },
    /// The file is shorter than its header says.
    #[error(
        "the memory file is cut off: {found} of {expected} bytes are there; \
         take the file from its source again"
    )]
    Truncated {
        /// Length that it should have in bytes.
        expected: u64,
        /// Length that it has.
        found: u64,
    },
    /// Something follows the memory.
    #[error(
        "the memory file ends at file offset {expected:#x}, but has {found} bytes: it was appended to"
    )]
    Trailing {
        /// Length that it should have in bytes.
        expected: u64,
        /// Length that it has.
        found: u64,
    },
    /// It holds the memory of another save.
    #[error(
        "the memory file belongs to save {found}, the state to save {expected}: \
         a machine needs the two files that were written together"
    )]
    OtherSave {
        /// The state's mark.
        expected: SaveId,
        /// The mark in the memory file.
        found: SaveId,
    },
    /// It holds another amount of memory than the machine has.
    #[error("the memory file holds {found} bytes of guest memory, the machine has {expected}")]
    OtherLength {
        /// Bytes of the machine's memory.
        expected: u64,
        /// Bytes of memory in the file.
        found: u64,
    },
    /// A chunk is not what was written.
    #[error(
        "chunk {chunk} is damaged (memory offset {memory_offset:#x}, file offset {file_offset:#x}, \
         {CHUNK} bytes): its checksum does not fit; take the file from its source again"
    )]
    Chunk {
        /// Number of the chunk.
        chunk: u64,
        /// Where it lies in the file that backs the guest's RAM.
        memory_offset: u64,
        /// Where it lies in the memory file.
        file_offset: u64,
    },
    /// A chunk beyond the end was asked for.
    #[error("chunk {chunk} was asked for, the memory file has {chunks}")]
    NoSuchChunk {
        /// Number that was asked for.
        chunk: u64,
        /// Number of chunks.
        chunks: u64,
    },
    /// The buffer for a chunk has not the chunk's length.
    #[error("the buffer for chunk {chunk} has {found} bytes, the chunk has {expected}")]
    Buffer {
        /// Number of the chunk.
        chunk: u64,
        /// Length of the chunk.
        expected: usize,
        /// Length of the buffer.
        found: usize,
    },
}
