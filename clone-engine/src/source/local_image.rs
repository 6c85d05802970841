//! An earlier image of a line as a source for a later one: pages that are in its memfd.
//!
//! Reads by `pread`, which unlike an access by a mapping never populates a hole.

use std::ops::Range;

use super::{PageSink, PageSource, SourceError};
use crate::image::MemoryImage;

/// See the module's text. What it is asked for must be in the image already.
pub(crate) struct LocalImage<'a>(pub(crate) &'a MemoryImage);

impl PageSource for LocalImage<'_> {
    fn name(&self) -> String {
        "an earlier image".into()
    }

    fn fetch(&self, ranges: &[Range<u64>], sink: &mut dyn PageSink) -> Result<(), SourceError> {
        for range in ranges {
            let mut content = vec![0; (range.end - range.start) as usize];
            let read = self.0.read(range.start, &mut content);
            read.map_err(|error| SourceError::Damaged {
                name: self.name(),
                offset: range.start,
                why: error.to_string(),
            })?;
            sink.pages(range.start, &content)?;
        }
        Ok(())
    }
}
