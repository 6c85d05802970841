//! Bytes on their way into an image, and who takes them from a source.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::Ordering;

use forkvm_vmm::memory::PAGE;
use vm_memory::VolatileSlice;

use super::{Filling, MemoryImage};
use crate::fault::counters::Cause;
use crate::source::{PageSink, SourceError};

/// Takes what a far source delivers for its image.
pub(crate) struct ImageSink<'a> {
    pub(crate) image: &'a MemoryImage,
    pub(crate) source: &'a str,
    pub(crate) cause: Cause,
}

impl PageSink for ImageSink<'_> {
    fn pages(&mut self, offset: u64, content: &[u8]) -> Result<(), SourceError> {
        let (image, len) = (self.image, content.len() as u64);
        let end = offset.checked_add(len).filter(|end| *end <= image.len);
        let (Some(end), true) = (end, offset.is_multiple_of(PAGE) && len.is_multiple_of(PAGE))
        else {
            return Err(SourceError::Rubbish {
                name: self.source.to_owned(),
                offset,
                len,
            });
        };
        // Pages that are not the source's to give are left out.
        image.take(&(offset..end), Content::from(content), self.cause)
    }

    fn zero(&mut self, range: Range<u64>) -> Result<(), SourceError> {
        let len = range.end.saturating_sub(range.start);
        if range.end > self.image.len {
            return Err(SourceError::Rubbish {
                name: self.source.to_owned(),
                offset: range.start,
                len,
            });
        }
        let zeros = [0; 16 * PAGE as usize];
        for start in range.clone().step_by(zeros.len()) {
            let len = (range.end - start).min(zeros.len() as u64);
            self.pages(start, &zeros[..len as usize])?;
        }
        Ok(())
    }

    fn there(&mut self, range: Range<u64>) -> Result<(), SourceError> {
        if self.image.came_elsewhere(&range) {
            return Ok(());
        }
        Err(SourceError::Rubbish {
            name: self.source.to_owned(),
            offset: range.start,
            len: range.end.saturating_sub(range.start),
        })
    }
}

/// Takes what an earlier image of the line holds.
pub(super) struct LineSink<'a> {
    pub(super) image: &'a MemoryImage,
    pub(super) filling: &'a Filling,
    pub(super) cause: Cause,
}

impl PageSink for LineSink<'_> {
    fn pages(&mut self, offset: u64, content: &[u8]) -> Result<(), SourceError> {
        let (range, filling) = (offset..offset + content.len() as u64, self.filling);
        self.image
            .insert(filling, &range, Content::from(content), |new| {
                filling.counters.count(self.cause, new);
                filling.base_left.fetch_sub(new, Ordering::AcqRel) == new
            })
    }

    /// An image holds no zero page that somebody would look for.
    fn zero(&mut self, _range: Range<u64>) -> Result<(), SourceError> {
        Ok(())
    }

    /// Nobody else fills the image of a line's later instant.
    fn there(&mut self, _range: Range<u64>) -> Result<(), SourceError> {
        Ok(())
    }
}

/// Bytes that go into an image; whoever owns them may write them meanwhile.
#[derive(Clone, Copy)]
pub(crate) struct Content<'a> {
    pub(super) address: *const u8,
    len: u64,
    borrowed: PhantomData<&'a [u8]>,
}

impl<'a> Content<'a> {
    pub(super) fn part(self, from: u64, len: u64) -> Content<'a> {
        assert!(from.checked_add(len).is_some_and(|end| end <= self.len));
        Content {
            address: self.address.wrapping_add(from as usize),
            len,
            borrowed: PhantomData,
        }
    }
}

impl<'a> From<&'a [u8]> for Content<'a> {
    fn from(bytes: &'a [u8]) -> Content<'a> {
        Content {
            address: bytes.as_ptr(),
            len: bytes.len() as u64,
            borrowed: PhantomData,
        }
    }
}

impl<'a> From<VolatileSlice<'a>> for Content<'a> {
    fn from(slice: VolatileSlice<'a>) -> Content<'a> {
        Content {
            address: slice.ptr_guard().as_ptr(),
            len: slice.len() as u64,
            borrowed: PhantomData,
        }
    }
}
