//! A memory file, opened: checked, read by the chunk, or loaded whole.
#![allow(unsafe_code)] // posix_fadvise.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use super::chunks::{self, DataChunks, Entry};
use super::header::{self, HEADER_LEN, Header};
use super::sparse::is_zero;
use super::{CHUNK, MemoryFault, MemoryFileError, MemorySource, Progress};
use crate::state_file::SaveId;

/// A memory file whose header and chunk table are whole. Its memory is checked as it is read.
#[derive(Debug)]
pub struct MemoryFile {
    file: File,
    name: String,
    header: Header,
    table: Vec<Entry>,
}

impl MemoryFile {
    /// Opens a memory file; `name` is what errors call it, such as its path.
    ///
    /// Reads the header and the table (8 bytes per 64 KiB of memory) and looks at the length of the
    /// file; the memory itself is not read.
    ///
    /// # Errors
    /// A file that is not a memory file of this format, that was cut off or appended to, or whose
    /// header or table is damaged.
    pub fn open(file: File, name: impl Into<String>) -> Result<MemoryFile, MemoryFileError> {
        let name = name.into();
        match read_tables(&file) {
            Ok((header, table)) => Ok(MemoryFile {
                file,
                name,
                header,
                table,
            }),
            Err(fault) => Err(MemoryFileError { file: name, fault }),
        }
    }

    /// The save that this memory is part of.
    pub fn save(&self) -> SaveId {
        self.header.save
    }

    /// Bytes of guest memory.
    pub fn memory_len(&self) -> u64 {
        self.header.memory_len
    }

    /// Where memory offset 0 stands in the file: a multiple of 64 KiB. From there on the file can
    /// be mapped; what is mapped is not checked.
    pub fn data_start(&self) -> u64 {
        header::data_start(self.header.memory_len)
    }

    /// The file itself, to be mapped.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Number of chunks of 64 KiB; the last may be shorter.
    pub fn chunks(&self) -> u64 {
        self.table.len() as u64
    }

    /// Which pages of a chunk hold data: bit `i` is its page `i`. All others are zero. `None`
    /// beyond the last chunk.
    pub fn data_pages(&self, chunk: u64) -> Option<u16> {
        let index = usize::try_from(chunk).ok()?;
        self.table.get(index).map(|entry| entry.pages)
    }

    /// Refuses a state file's memory that is not of the same save.
    pub fn check_save(&self, expected: SaveId) -> Result<(), MemoryFileError> {
        if self.header.save == expected {
            return Ok(());
        }
        Err(self.error(MemoryFault::OtherSave {
            expected,
            found: self.header.save,
        }))
    }

    /// Refuses memory of another size than the machine's, in bytes.
    pub fn check_len(&self, expected: u64) -> Result<(), MemoryFileError> {
        if self.header.memory_len == expected {
            return Ok(());
        }
        Err(self.error(MemoryFault::OtherLength {
            expected,
            found: self.header.memory_len,
        }))
    }

    /// Reads one chunk and checks it; `into` has the chunk's length. A chunk that the table calls
    /// zero is not read from the file.
    ///
    /// # Errors
    /// [`MemoryFault::Chunk`] when the content is not what was written; `into` is then undefined.
    pub fn read_chunk(&self, chunk: u64, into: &mut [u8]) -> Result<(), MemoryFileError> {
        self.try_read_chunk(chunk, into)
            .map_err(|fault| self.error(fault))
    }

    fn try_read_chunk(&self, chunk: u64, into: &mut [u8]) -> Result<(), MemoryFault> {
        let entry = usize::try_from(chunk)
            .ok()
            .and_then(|index| self.table.get(index));
        let Some(&entry) = entry else {
            return Err(MemoryFault::NoSuchChunk {
                chunk,
                chunks: self.chunks(),
            });
        };
        let expected = chunks::len_of(chunk, self.header.memory_len);
        if into.len() != expected {
            return Err(MemoryFault::Buffer {
                chunk,
                expected,
                found: into.len(),
            });
        }
        if entry.pages == 0 {
            into.fill(0);
            return Ok(());
        }
        let offset = self.data_start() + chunk * CHUNK as u64;
        self.file
            .read_exact_at(into, offset)
            .map_err(|source| MemoryFault::Io {
                what: "read a chunk",
                offset,
                source,
            })?;
        if Entry::of(into) == entry {
            Ok(())
        } else {
            Err(self.damaged(chunk))
        }
    }

    /// Has the kernel read `range` of memory ahead. A hint: whether it does changes nothing but time.
    pub fn will_need(&self, range: &Range<u64>) {
        let offset = self.data_start() + range.start;
        // SAFETY: the descriptor is open; the call touches no memory.
        let refused = unsafe {
            libc::posix_fadvise(
                self.file.as_raw_fd(),
                offset as libc::off_t,
                (range.end - range.start) as libc::off_t,
                libc::POSIX_FADV_WILLNEED,
            )
        };
        if refused != 0 {
            tracing::trace!(refused, "no reading ahead here");
        }
    }

    /// Reads all memory and checks it, holes and zero pages included.
    ///
    /// # Errors
    /// [`MemoryFault::Chunk`] names the first chunk that is not what was written.
    pub fn verify(&self, progress: &mut dyn FnMut(Progress)) -> Result<(), MemoryFileError> {
        self.walk(progress, |_, _, _| Ok(()))
            .map_err(|fault| self.error(fault))
    }

    /// Fills a fresh memfd of the same length, writing only pages with data; checks everything.
    ///
    /// # Errors
    /// As [`verify`](Self::verify), and a target that is of another length or holds data. After an
    /// error the target is partly filled, and to be dropped.
    pub fn load_into(
        &self,
        target: &File,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(), MemoryFileError> {
        check_target(target, self.header.memory_len).map_err(|fault| self.error(fault))?;
        self.walk(progress, |index, entry, content| {
            for (page_offset, pages) in entry.data(content) {
                let offset = index * CHUNK as u64 + page_offset as u64;
                target
                    .write_all_at(pages, offset)
                    .map_err(|source| MemoryFault::Target { offset, source })?;
            }
            Ok(())
        })
        .map_err(|fault| self.error(fault))
    }

    /// Hands every chunk with data to `visit`, after it was checked.
    fn walk(
        &self,
        progress: &mut dyn FnMut(Progress),
        mut visit: impl FnMut(u64, Entry, &[u8]) -> Result<(), MemoryFault>,
    ) -> Result<(), MemoryFault> {
        let total = self.header.memory_len;
        let area = DataArea {
            file: &self.file,
            start: self.data_start(),
            len: total,
        };
        let mut file_chunks = DataChunks::new(&area, total);
        // Chunks below this one have been checked.
        let mut checked = 0;
        while let Some((index, content)) = file_chunks
            .next()
            .map_err(|fault| in_memory_file(fault, area.start))?
        {
            self.check_holes(checked..index)?;
            let entry = self.table[index as usize];
            if Entry::of(content) != entry {
                return Err(self.damaged(index));
            }
            visit(index, entry, content)?;
            checked = index + 1;
            progress(Progress {
                done: index * CHUNK as u64 + content.len() as u64,
                total,
            });
        }
        self.check_holes(checked..self.chunks())?;
        progress(Progress { done: total, total });
        Ok(())
    }

    /// Chunks that are holes in the file have to be zero by the table too.
    fn check_holes(&self, holes: Range<u64>) -> Result<(), MemoryFault> {
        for chunk in holes {
            if self.table[chunk as usize].pages != 0 {
                return Err(self.damaged(chunk));
            }
        }
        Ok(())
    }

    fn damaged(&self, chunk: u64) -> MemoryFault {
        let memory_offset = chunk * CHUNK as u64;
        let file_offset = self.data_start() + memory_offset;
        MemoryFault::Chunk {
            chunk,
            memory_offset,
            file_offset,
        }
    }

    fn error(&self, fault: MemoryFault) -> MemoryFileError {
        MemoryFileError {
            file: self.name.clone(),
            fault,
        }
    }
}

/// The part of the memory file that holds memory.
struct DataArea<'a> {
    file: &'a File,
    start: u64,
    len: u64,
}

impl MemorySource for DataArea<'_> {
    fn memory_len(&self) -> io::Result<u64> {
        Ok(self.len)
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(into, self.start + offset)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let found = self.file.next_data(self.start + offset)?;
        Ok(found.map(|range| range.start - self.start..range.end - self.start))
    }
}

/// An error of the walk over a [`DataArea`] is about the memory file, not about a guest's memory.
fn in_memory_file(fault: MemoryFault, start: u64) -> MemoryFault {
    match fault {
        MemoryFault::Source { offset, source } => MemoryFault::Io {
            what: "read the memory",
            offset: start + offset,
            source,
        },
        other => other,
    }
}

/// Reads and checks all that stands before the memory.
fn read_tables(file: &File) -> Result<(Header, Vec<Entry>), MemoryFault> {
    let found = file
        .metadata()
        .map_err(|source| MemoryFault::Io {
            what: "look at the file",
            offset: 0,
            source,
        })?
        .len();
    let mut bytes = [0; HEADER_LEN];
    // A file shorter than a header may still be told from a foreign one.
    let there = found.min(HEADER_LEN as u64) as usize;
    read_at(file, 0, &mut bytes[..there])?;
    let decoded = Header::decode(&bytes);
    if there < HEADER_LEN {
        return Err(match decoded {
            Err(fault @ (MemoryFault::Foreign | MemoryFault::StateFile)) => fault,
            _ => MemoryFault::Truncated {
                expected: HEADER_LEN as u64,
                found,
            },
        });
    }
    let header = decoded?;
    let data_start = header::data_start(header.memory_len);
    let expected = data_start + header.memory_len;
    if found < expected {
        return Err(MemoryFault::Truncated { expected, found });
    }
    if found > expected {
        return Err(MemoryFault::Trailing { expected, found });
    }
    let len = header::table_len(header.memory_len);
    let mut table = vec![0; len as usize];
    read_at(file, HEADER_LEN as u64, &mut table)?;
    if crc32fast::hash(&table) != header.table_crc {
        return Err(MemoryFault::Table { len });
    }
    let table_end = HEADER_LEN as u64 + len;
    let mut padding = vec![0; (data_start - table_end) as usize];
    read_at(file, table_end, &mut padding)?;
    if !is_zero(&padding) {
        let first = padding.iter().take_while(|byte| **byte == 0).count();
        return Err(MemoryFault::Padding {
            offset: table_end + first as u64,
        });
    }
    Ok((header, header::decode_table(&table, header.memory_len)?))
}

fn read_at(file: &File, offset: u64, into: &mut [u8]) -> Result<(), MemoryFault> {
    file.read_exact_at(into, offset)
        .map_err(|source| MemoryFault::Io {
            what: "read",
            offset,
            source,
        })
}

/// A target of the right size, of which nothing is populated.
fn check_target(target: &File, expected: u64) -> Result<(), MemoryFault> {
    let failed = |source| MemoryFault::Target { offset: 0, source };
    let found = target.metadata().map_err(failed)?.len();
    if found != expected {
        return Err(MemoryFault::TargetLength { expected, found });
    }
    match target.next_data(0).map_err(failed)? {
        Some(data) => Err(MemoryFault::TargetNotEmpty { offset: data.start }),
        None => Ok(()),
    }
}
