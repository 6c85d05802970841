//! Guest memory to a memory file.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::chunks::{self, DataChunks, Entry};
use super::header::{self, HEADER_LEN, Header};
use super::{CHUNK, MemoryFault, MemorySource, PAGE, Progress};
use crate::state_file::SaveId;

/// What [`write()`] has written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// Bytes of guest memory.
    pub memory: u64,
    /// Bytes of it that are in the file; the others are zero and left out.
    pub data: u64,
}

/// Writes the memory of `source` to `file`, which has to be empty.
///
/// Zero pages are left out, also where the source announces data. The header is written last: a
/// file whose writing was cut short is not a memory file. Durability is the caller's: nothing is
/// synced here. `progress` is called after each chunk with data, and at the end.
///
/// # Errors
/// What the source and the file say, and a size of memory that the format does not hold.
pub fn write<S: MemorySource + ?Sized>(
    file: &File,
    save: SaveId,
    source: &S,
    progress: &mut dyn FnMut(Progress),
) -> Result<Written, MemoryFault> {
    let total = source
        .memory_len()
        .map_err(|source| MemoryFault::Source { offset: 0, source })?;
    header::check_memory_len(total)?;
    let found = file
        .metadata()
        .map_err(|source| MemoryFault::Io {
            what: "look at the file",
            offset: 0,
            source,
        })?
        .len();
    if found != 0 {
        return Err(MemoryFault::NotEmpty { len: found });
    }
    let data_start = header::data_start(total);
    file.set_len(data_start + total)
        .map_err(|source| MemoryFault::Io {
            what: "extend the file",
            offset: data_start + total,
            source,
        })?;

    let mut table = vec![Entry::default(); chunks::count(total) as usize];
    let mut data = 0;
    let mut source_chunks = DataChunks::new(source, total);
    while let Some((index, content)) = source_chunks.next()? {
        let entry = Entry::of(content);
        table[index as usize] = entry;
        let start = index * CHUNK as u64;
        for (offset, pages) in entry.data(content) {
            write_at(file, data_start + start + offset as u64, pages)?;
        }
        data += u64::from(entry.pages.count_ones()) * PAGE as u64;
        progress(Progress {
            done: start + content.len() as u64,
            total,
        });
    }

    let table = header::encode_table(&table);
    write_at(file, HEADER_LEN as u64, &table)?;
    let header = Header {
        memory_len: total,
        save,
        table_crc: crc32fast::hash(&table),
    };
    write_at(file, 0, &header.encode())?;
    progress(Progress { done: total, total });
    Ok(Written {
        memory: total,
        data,
    })
}

fn write_at(file: &File, offset: u64, bytes: &[u8]) -> Result<(), MemoryFault> {
    file.write_all_at(bytes, offset)
        .map_err(|source| MemoryFault::Io {
            what: "write",
            offset,
            source,
        })
}
