//! What every source must do, whatever it is.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::thread;

use forkvm_vmm::memory::PAGE;

use super::super::{PageSink, PageSource, SourceError};
use super::content;

/// Keeps what comes, and refuses everything after some pages.
pub(super) struct Kept<'a> {
    pages: BTreeMap<u64, Vec<u8>>,
    memory: Memory<'a>,
    refuse_after: usize,
}

/// What a source is asked for.
#[derive(Clone, Copy)]
struct Memory<'a> {
    len: u64,
    /// The image's, of a source that has another process put the pages there.
    file: Option<&'a File>,
}

impl Kept<'_> {
    pub(super) fn new(len: u64) -> Kept<'static> {
        Memory { len, file: None }.kept()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }
}

impl<'a> Memory<'a> {
    fn kept(self) -> Kept<'a> {
        Kept {
            pages: BTreeMap::new(),
            memory: self,
            refuse_after: usize::MAX,
        }
    }
}

impl PageSink for Kept<'_> {
    fn pages(&mut self, offset: u64, content: &[u8]) -> Result<(), SourceError> {
        assert_eq!(offset % PAGE, 0, "a page begins at a multiple of its size");
        assert_eq!(content.len() as u64 % PAGE, 0, "pages are whole");
        assert!(
            offset + content.len() as u64 <= self.memory.len,
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
        let Some(file) = self.memory.file else {
            panic!("{range:?} is nowhere but in the source")
        };
        let mut content = vec![0; (range.end - range.start) as usize];
        file.read_exact_at(&mut content, range.start).unwrap();
        self.pages(range.start, &content)
    }
}

fn bytes(pages: &Range<u64>) -> Range<u64> {
    pages.start * PAGE..pages.end * PAGE
}

/// Holds `source` to what [`PageSource`] promises. It has `own` pages with their
/// [`content`] of a memory of `len` bytes; all other pages are zero.
pub(super) fn conforms(source: &dyn PageSource, len: u64, own: &[Range<u64>]) {
    of_memory(source, Memory { len, file: None }, own);
}

/// The same of a source that says of pages that they are there: in the image's `file`.
pub(super) fn conforms_in(file: &File, source: &dyn PageSource, len: u64, own: &[Range<u64>]) {
    let file = Some(file);
    of_memory(source, Memory { len, file }, own);
}

fn of_memory(source: &dyn PageSource, memory: Memory<'_>, own: &[Range<u64>]) {
    assert!(!source.name().is_empty());
    nothing_asked_nothing_wrong(source, memory);
    let first = own.first().unwrap().clone();
    let single: Vec<Range<u64>> = vec![first.start..first.start + 1];
    for asked in [own, &single[..]] {
        delivers(source, memory, asked);
        // The same, whenever it is asked for.
        delivers(source, memory, asked);
        for range in asked {
            shows_what_it_delivers(source, range);
        }
    }
    source.hint(&own.iter().map(bytes).collect::<Vec<_>>());
    delivers(source, memory, own);
    several_ask_at_once(source, memory, own);
    stops_when_the_sink_does(source, memory, own);
}

fn nothing_asked_nothing_wrong(source: &dyn PageSource, memory: Memory<'_>) {
    source.fetch(&[], &mut memory.kept()).unwrap();
}

fn delivers(source: &dyn PageSource, memory: Memory<'_>, asked: &[Range<u64>]) {
    let mut kept = memory.kept();
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

fn several_ask_at_once(source: &dyn PageSource, memory: Memory<'_>, own: &[Range<u64>]) {
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                own.iter()
                    .for_each(|range| delivers(source, memory, std::slice::from_ref(range)))
            });
        }
    });
}

fn stops_when_the_sink_does(source: &dyn PageSource, memory: Memory<'_>, own: &[Range<u64>]) {
    let ranges: Vec<_> = own.iter().map(bytes).collect();
    let mut full = memory.kept();
    full.refuse_after = 1;
    let error = source.fetch(&ranges, &mut full).unwrap_err();
    assert!(matches!(error, SourceError::Insert { .. }), "{error}");
}
