//! An image that another process fills, as the source of the same image here. Both ends are of this process.

use std::ops::Range;
use std::sync::Arc;

use forkvm_vmm::memory::{self, PAGE};

use super::super::{PageSink, PageSource, SourceError};
use super::kit::conforms_in;
use super::{content, faults, has_userfaultfd, image_of};
use crate::fault::FaultHandler;
use crate::image::MemoryImage;
use crate::page_link::PageLink;

const PAGES: u64 = 64;
const LEN: u64 = PAGES * PAGE;
const OWN: [Range<u64>; 3] = [0..1, 5..19, 63..64];

/// Where the other end has the pages from.
struct There;

impl PageSource for There {
    fn name(&self) -> String {
        "there".into()
    }

    fn fetch(&self, ranges: &[Range<u64>], sink: &mut dyn PageSink) -> Result<(), SourceError> {
        let mut pages = ranges
            .iter()
            .cloned()
            .flat_map(|range| range.step_by(PAGE as usize));
        pages.try_for_each(|offset| sink.pages(offset, &content(offset / PAGE)))
    }
}

/// The two ends, and an image that the first fills.
struct Ends {
    filling: Arc<PageLink>,
    asking: Arc<PageLink>,
    image: Arc<MemoryImage>,
    _faults: FaultHandler,
}

impl Ends {
    fn new() -> Ends {
        let (filling, socket) = PageLink::pair("who asks".into()).unwrap();
        let asking = PageLink::inherited("who fills".into(), socket).unwrap();
        filling.serve(|| ()).unwrap();
        asking.serve(|| ()).unwrap();
        let faults = faults();
        Ends {
            filling,
            asking,
            image: image_of(&faults, PAGES, &OWN, Arc::new(There)),
            _faults: faults,
        }
    }
}

impl Drop for Ends {
    fn drop(&mut self) {
        self.filling.close();
        self.asking.close();
    }
}

#[test]
fn an_image_that_is_filled_elsewhere_conforms_and_only_what_was_asked_for_is_brought() {
    if !has_userfaultfd() {
        return;
    }
    let ends = Ends::new();
    ends.filling.offer(&ends.image, None);
    let source = ends.asking.filled_there(ends.image.name());
    conforms_in(ends.image.file(), &source, LEN, &OWN);
    let data = memory::data_extents(ends.image.file()).unwrap();
    assert_eq!(data, OWN.map(|run| run.start * PAGE..run.end * PAGE));
}

#[test]
fn an_image_that_the_other_end_has_not_or_that_has_gone_with_it_is_an_error_at_once() {
    if !has_userfaultfd() {
        return;
    }
    let ends = Ends::new();
    let source = ends.asking.filled_there(ends.image.name());
    let ask = || source.fetch(&[0..PAGE], &mut super::kit::Kept::new(LEN));
    let error = ask().unwrap_err();
    assert!(matches!(error, SourceError::Gone { .. }), "{error}");
    ends.filling.close();
    let error = ask().unwrap_err();
    assert!(error.to_string().contains("who fills"), "{error}");
}
