//! Chunks: what they are made of, and the one walk over those that may hold data.
//!
//! Writing, verifying and loading are all this walk, so that they cannot disagree about a hole.

use std::ops::Range;

use super::sparse::is_zero;
use super::{CHUNK, MemoryFault, MemorySource, PAGE};

/// Number of chunks in `len` bytes of memory; the last may be short.
pub(super) fn count(len: u64) -> u64 {
    len.div_ceil(CHUNK as u64)
}

/// Bytes of chunk `index` in `len` bytes of memory.
pub(super) fn len_of(index: u64, len: u64) -> usize {
    // At most CHUNK.
    (len - index * CHUNK as u64).min(CHUNK as u64) as usize
}

/// What the table says of a chunk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Entry {
    /// Bit `i`: page `i` of the chunk holds something else than zeros.
    pub(super) pages: u16,
    /// CRC-32 of the whole chunk, its zero pages included; 0 when no page holds data.
    pub(super) crc: u32,
}

impl Entry {
    /// The entry of a chunk with this content.
    pub(super) fn of(content: &[u8]) -> Entry {
        let mut pages = 0;
        for (index, page) in content.chunks(PAGE).enumerate() {
            pages |= u16::from(!is_zero(page)) << index;
        }
        let crc = if pages == 0 {
            0
        } else {
            crc32fast::hash(content)
        };
        Entry { pages, crc }
    }

    /// Whether a chunk of `len` bytes can have this entry.
    pub(super) fn fits(self, len: usize) -> bool {
        let beyond = u32::from(self.pages) >> len.div_ceil(PAGE) != 0;
        !beyond && (self.pages != 0 || self.crc == 0)
    }

    /// The parts of `content` that are to be written: runs of pages with data.
    pub(super) fn data(self, content: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
        let mut page = 0;
        std::iter::from_fn(move || {
            // Above bit 15 all is zero, so that a run ends at the end of the chunk.
            let left = u32::from(self.pages) >> page;
            if left == 0 {
                return None;
            }
            let first = page + left.trailing_zeros();
            let run = (u32::from(self.pages) >> first).trailing_ones();
            page = first + run;
            let start = first as usize * PAGE;
            let end = (page as usize * PAGE).min(content.len());
            Some((start, &content[start..end]))
        })
    }
}

/// Walks over the chunks in which a source announces data. All others are zero.
pub(super) struct DataChunks<'a, S: ?Sized> {
    source: &'a S,
    len: u64,
    /// Data that was announced and not yet passed; `None` before the first question.
    extent: Option<Range<u64>>,
    /// The next chunk to look at.
    index: u64,
    buffer: Vec<u8>,
}

impl<'a, S: MemorySource + ?Sized> DataChunks<'a, S> {
    /// Starts at the beginning of `len` bytes of memory.
    pub(super) fn new(source: &'a S, len: u64) -> Self {
        DataChunks {
            source,
            len,
            extent: None,
            index: 0,
            buffer: vec![0; CHUNK],
        }
    }

    /// Number and content of the next chunk that may hold data.
    pub(super) fn next(&mut self) -> Result<Option<(u64, &[u8])>, MemoryFault> {
        let asked = self.index * CHUNK as u64;
        if !self.find_data(asked)? {
            return Ok(None);
        }
        let Some(first) = &self.extent else {
            return Ok(None);
        };
        let index = (first.start / CHUNK as u64).max(self.index);
        let start = index * CHUNK as u64;
        let end = start + len_of(index, self.len) as u64;
        let content = &mut self.buffer[..len_of(index, self.len)];
        content.fill(0);
        while let Some(extent) = self.extent.clone().filter(|extent| extent.start < end) {
            let part = extent.start.max(start)..extent.end.min(end);
            self.source
                .read_at(
                    part.start,
                    &mut self.buffer[(part.start - start) as usize..(part.end - start) as usize],
                )
                .map_err(|source| MemoryFault::Source {
                    offset: part.start,
                    source,
                })?;
            if extent.end > end || !self.find_data(part.end)? {
                break;
            }
        }
        self.index = index + 1;
        Ok(Some((index, &self.buffer[..(end - start) as usize])))
    }

    /// Sets `extent` to the data at or after `from`; false when there is none.
    fn find_data(&mut self, from: u64) -> Result<bool, MemoryFault> {
        if self.extent.as_ref().is_some_and(|extent| extent.end > from) {
            return Ok(true);
        }
        self.extent = None;
        if from >= self.len {
            return Ok(false);
        }
        let next = self
            .source
            .next_data(from)
            .map_err(|source| MemoryFault::Source {
                offset: from,
                source,
            })?;
        if let Some(Range { start, end }) = next
            && (start < from || end <= start || end > self.len)
        {
            return Err(MemoryFault::Extent {
                asked: from,
                start,
                end,
            });
        }
        self.extent = next;
        Ok(self.extent.is_some())
    }
}
