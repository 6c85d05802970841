//! The memory of a VM of this process as a source: what it held at the fork.
//!
//! The VM may run. Its pages that an image still misses are write-protected ([`crate::freeze`]), and
//! a write brings the page into the image before it goes through ([`VmMemory`]), so whatever is read
//! here for a page that is still missing is what stood there at the fork.

use std::ops::Range;
use std::sync::Arc;

use vm_memory::VolatileSlice;

use super::{PageSink, PageSource, SourceError};
use crate::vm_memory::VmMemory;

/// See the module's text. Dropped when the image has all that it needs.
pub(crate) struct LiveParent {
    memory: Arc<VmMemory>,
}

impl LiveParent {
    /// The VM must have the image among those that it feeds before it runs on.
    pub(crate) fn new(memory: Arc<VmMemory>) -> LiveParent {
        LiveParent { memory }
    }
}

impl PageSource for LiveParent {
    fn name(&self) -> String {
        format!("VM {}", self.memory.name())
    }

    fn fetch(&self, ranges: &[Range<u64>], sink: &mut dyn PageSink) -> Result<(), SourceError> {
        for range in ranges {
            let mut content = vec![0; (range.end - range.start) as usize];
            let shown = self.memory.show(range, &mut |pages| {
                pages.copy_to(&mut content[..]);
            });
            if !shown {
                let (name, why) = (self.name(), "it has ended".to_owned());
                return Err(SourceError::Gone { name, why });
            }
            sink.pages(range.start, &content)?;
        }
        Ok(())
    }

    fn local(&self, range: &Range<u64>, show: &mut dyn FnMut(VolatileSlice<'_>)) -> bool {
        self.memory.show(range, show)
    }
}

impl Drop for LiveParent {
    fn drop(&mut self) {
        self.memory.fed();
    }
}
