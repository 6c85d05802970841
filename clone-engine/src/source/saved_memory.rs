//! The memory file of a saved machine as a source: each chunk is checked as it is read.

use std::ops::Range;

use forkvm_vmm::memory_file::{self, MemoryFile};

use super::{PageSink, PageSource, SourceError};

const CHUNK: u64 = memory_file::CHUNK as u64;
const PAGE: u64 = memory_file::PAGE as u64;

/// See the module's text.
pub(crate) struct SavedMemory {
    file: MemoryFile,
}

impl SavedMemory {
    pub(crate) fn new(file: MemoryFile) -> SavedMemory {
        SavedMemory { file }
    }

    /// The pages that hold something, as ranges of offsets, rising and apart.
    pub(crate) fn data(&self) -> Vec<Range<u64>> {
        let mut data: Vec<Range<u64>> = Vec::new();
        for chunk in 0..self.file.chunks() {
            let pages = self.file.data_pages(chunk).unwrap_or(0);
            for page in (0..CHUNK / PAGE).filter(|page| pages >> page & 1 == 1) {
                let start = chunk * CHUNK + page * PAGE;
                match data.last_mut() {
                    Some(last) if last.end == start => last.end += PAGE,
                    _ => data.push(start..start + PAGE),
                }
            }
        }
        data
    }
}

impl PageSource for SavedMemory {
    fn name(&self) -> String {
        "the saved machine".into()
    }

    fn fetch(&self, ranges: &[Range<u64>], sink: &mut dyn PageSink) -> Result<(), SourceError> {
        let mut content = vec![0; memory_file::CHUNK];
        for range in ranges {
            for chunk in range.start / CHUNK..range.end.div_ceil(CHUNK) {
                let start = chunk * CHUNK;
                let len = CHUNK.min(self.file.memory_len() - start) as usize;
                let read = self.file.read_chunk(chunk, &mut content[..len]);
                read.map_err(|error| SourceError::Damaged {
                    name: self.name(),
                    offset: start,
                    why: error.to_string(),
                })?;
                // The whole chunk is checked, so the whole chunk is delivered.
                sink.pages(start, &content[..len])?;
            }
        }
        Ok(())
    }

    fn hint(&self, ranges: &[Range<u64>]) {
        ranges.iter().for_each(|range| self.file.will_need(range));
    }
}
