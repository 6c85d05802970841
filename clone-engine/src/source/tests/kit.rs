//! What every source must do, whatever it is.

use std::collections::BTreeMap;
use std::ops::Range;
use std::thread;

use forkvm_vmm::memory::PAGE;

use super::super::{PageSink, PageSource, SourceError};
use super::content;

/// Keeps what comes, and refuses everything after some pages.
pub(super) struct Kept {
    pages: BTreeMap<u64, Vec<u8>>,
    len: u64,
    refuse_after: usize,
}

impl Kept {
    pub(super) fn new(len: u64) -> Kept {
        Kept {
            pages: BTreeMap::new(),
            len,
            refuse_after: usize::MAX,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }
}

impl PageSink for Kept {
    fn pages(&mut self, offset: u64, content: &[u8]) -> Result<(), SourceError> {
        assert_eq!(offset % PAGE, 0, "a page begins at a multiple of its size");
        assert_eq!(content.len() as u64 % PAGE, 0, "pages are whole");
        assert!(
            offset + content.len() as u64 <= self.len,
            "there is no such page"
        );
        for (page, content) in (offset / PAGE..).zip(content.chunks_exact(PAGE as usize)) {
            if self.pages.len() >= self.refuse_after {
                let why = "the sink is full".to_owned();
                return Err(SourceError::Insert { offset, why });
            }
            self.pages.insert(page, content.to_vec());
        }
        Ok(())
    }

    fn zero(&mut self, range: Range<u64>) -> Result<(), SourceError> {
        let zeros = vec![0; (range.end - range.start) as usize];
        self.pages(range.start, &zeros)
    }

    fn there(&mut self, range: Range<u64>) -> Result<(), SourceError> {
        panic!("{range:?} is nowhere but in the source")
    }
}

fn bytes(pages: &Range<u64>) -> Range<u64> {
    pages.start * PAGE..pages.end * PAGE
}

/// Holds `source` to what [`PageSource`] promises. It has `own` pages with their
/// [`content`] of a memory of `len` bytes; all other pages are zero.
pub(super) fn conforms(source: &dyn PageSource, len: u64, own: &[Range<u64>]) {
    assert!(!source.name().is_empty());
    nothing_asked_nothing_wrong(source, len);
    let first = own.first().unwrap().clone();
    let single: Vec<Range<u64>> = vec![first.start..first.start + 1];
    for asked in [own, &single[..]] {
        delivers(source, len, asked);
        // The same, whenever it is asked for.
        delivers(source, len, asked);
        for range in asked {
            shows_what_it_delivers(source, range);
        }
    }
    source.hint(&own.iter().map(bytes).collect::<Vec<_>>());
    delivers(source, len, own);
    several_ask_at_once(source, len, own);
    stops_when_the_sink_does(source, len, own);
}

fn nothing_asked_nothing_wrong(source: &dyn PageSource, len: u64) {
    source.fetch(&[], &mut Kept::new(len)).unwrap();
}

fn delivers(source: &dyn PageSource, len: u64, asked: &[Range<u64>]) {
    let mut kept = Kept::new(len);
    let ranges: Vec<_> = asked.iter().map(bytes).collect();
    source.fetch(&ranges, &mut kept).unwrap();
    for number in asked.iter().cloned().flatten() {
        assert!(
            kept.pages.contains_key(&number),
            "page {number} was asked for"
        );
        assert!(kept.pages[&number] == content(number), "page {number}");
    }
}

fn shows_what_it_delivers(source: &dyn PageSource, pages: &Range<u64>) {
    let mut shown = Vec::new();
    let local = source.local(&bytes(pages), &mut |slice| {
        assert!(shown.is_empty(), "a range is shown once");
        shown = vec![0; slice.len()];
        slice.copy_to(&mut shown[..]);
    });
    let expected: Vec<u8> = if local {
        pages.clone().flat_map(content).collect()
    } else {
        Vec::new()
    };
    assert!(shown == expected, "pages {pages:?}, local: {local}");
}

fn several_ask_at_once(source: &dyn PageSource, len: u64, own: &[Range<u64>]) {
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                own.iter()
                    .for_each(|range| delivers(source, len, std::slice::from_ref(range)))
            });
        }
    });
}

fn stops_when_the_sink_does(source: &dyn PageSource, len: u64, own: &[Range<u64>]) {
    let ranges: Vec<_> = own.iter().map(bytes).collect();
    let mut full = Kept::new(len);
    full.refuse_after = 1;
    let error = source.fetch(&ranges, &mut full).unwrap_err();
    assert!(matches!(error, SourceError::Insert { .. }), "{error}");
}
