//! What an image makes of a source that is slow, fails, lies, panics, or says nothing.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use forkvm_vmm::memory::{self, PAGE};
use vm_memory::VolatileSlice;

use super::super::{PageSink, PageSource, SourceError};
use super::{DEADLINE, content, faults, has_userfaultfd, image_of, page};
use crate::fault::Notice;
use crate::image::{MemoryImage, OwnerTable, Plan};

/// Pages of the memory; its own ones are two chunks and some.
const PAGES: u64 = 64;
const OWN: [Range<u64>; 2] = [0..4, 8..14];

/// What a source does, in place of delivering `pages` (page numbers).
type Deliver = dyn Fn(Range<u64>, &mut dyn PageSink) -> Result<(), SourceError> + Send + Sync;

/// A source that is not at hand, and does as a test says.
pub(super) struct Liar {
    deliver: Box<Deliver>,
    calls: AtomicU32,
}

impl Liar {
    pub(super) fn new(
        deliver: impl Fn(Range<u64>, &mut dyn PageSink) -> Result<(), SourceError>
        + Send
        + Sync
        + 'static,
    ) -> Arc<Liar> {
        Arc::new(Liar {
            deliver: Box::new(deliver),
            calls: AtomicU32::new(0),
        })
    }
}

impl PageSource for Liar {
    fn name(&self) -> String {
        "liar".into()
    }

    fn fetch(&self, ranges: &[Range<u64>], sink: &mut dyn PageSink) -> Result<(), SourceError> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        for range in ranges {
            (self.deliver)(range.start / PAGE..range.end / PAGE, sink)?;
        }
        Ok(())
    }
}

pub(super) fn honest(pages: Range<u64>, sink: &mut dyn PageSink) -> Result<(), SourceError> {
    for number in pages {
        sink.pages(number * PAGE, &content(number))?;
    }
    Ok(())
}

/// Asks a liar for the pages of the second chunk; the first chunk came by honest means.
fn asked_for_the_second_chunk(
    deliver: impl Fn(Range<u64>, &mut dyn PageSink) -> Result<(), SourceError> + Send + Sync + 'static,
) -> Option<(Arc<MemoryImage>, Result<(), SourceError>)> {
    if !has_userfaultfd() {
        return None;
    }
    let faults = faults();
    let lies = move |pages: Range<u64>, sink: &mut dyn PageSink| {
        if pages.start < 8 {
            honest(pages, sink)
        } else {
            deliver(pages, sink)
        }
    };
    let image = image_of(&faults, PAGES, &OWN, Liar::new(lies));
    image.prefetch(0).unwrap();
    let asked = image.prefetch(8 * PAGE);
    // Nothing but own pages, and those right.
    for number in 0..PAGES {
        let found = page(&image, number);
        let is_own = OWN.iter().any(|run| run.contains(&number));
        let hole = found == vec![0; PAGE as usize];
        assert!(hole || is_own && found == content(number), "page {number}");
    }
    assert!(page(&image, 3) == content(3));
    Some((image, asked))
}

/// The pages that `deliver` was asked for are reported as not to be had, and stay holes; what was
/// there stays, and the source may deliver others.
fn is_found_out(
    expected: fn(&SourceError) -> bool,
    deliver: impl Fn(Range<u64>, &mut dyn PageSink) -> Result<(), SourceError> + Send + Sync + 'static,
) {
    let Some((image, asked)) = asked_for_the_second_chunk(deliver) else {
        return;
    };
    let error = asked.unwrap_err();
    assert!(expected(&error), "{error}");
    assert!(error.to_string().contains("liar"), "its name: {error}");
    let data = memory::data_extents(image.file()).unwrap();
    assert!(data.iter().all(|run| run.end <= 8 * PAGE), "{data:?}");
    assert!(!image.is_whole());
}

fn damaged(error: &SourceError) -> bool {
    matches!(error, SourceError::Damaged { offset, .. } if *offset == 8 * PAGE)
}

fn rubbish(error: &SourceError) -> bool {
    matches!(error, SourceError::Rubbish { .. })
}

#[test]
fn a_source_that_delivers_nothing_and_calls_it_done_is_found_out() {
    is_found_out(damaged, |_, _| Ok(()));
}

#[test]
fn a_source_that_delivers_other_pages_than_those_asked_for_is_found_out() {
    is_found_out(damaged, |_, sink| honest(0..4, sink));
}

#[test]
fn a_source_that_leaves_a_page_out_is_found_out() {
    let asked = asked_for_the_second_chunk(|pages, sink| honest(pages.start + 1..pages.end, sink));
    let Some((image, asked)) = asked else { return };
    assert!(damaged(&asked.unwrap_err()));
    assert!(page(&image, 9) == content(9), "what it delivered is good");
}

#[test]
fn a_source_that_delivers_part_of_a_page_is_refused() {
    is_found_out(rubbish, |pages, sink| {
        let page = content(pages.start);
        sink.pages(pages.start * PAGE, &page[..page.len() - 1])
    });
}

#[test]
fn a_source_that_delivers_between_pages_is_refused() {
    is_found_out(rubbish, |pages, sink| {
        sink.pages(pages.start * PAGE + 8, &content(pages.start))
    });
}

#[test]
fn a_source_that_delivers_beyond_the_end_is_refused() {
    is_found_out(rubbish, |_, sink| sink.pages(PAGES * PAGE, &content(0)));
    is_found_out(rubbish, |_, sink| {
        // Its first page would be one that is needed.
        sink.pages(8 * PAGE, &vec![1; ((PAGES - 7) * PAGE) as usize])
    });
    is_found_out(rubbish, |_, sink| {
        sink.pages(u64::MAX - PAGE + 1, &content(0))
    });
}

#[test]
fn a_source_that_calls_more_zero_than_there_is_is_refused() {
    is_found_out(rubbish, |_, sink| sink.zero(8 * PAGE..(PAGES + 1) * PAGE));
    is_found_out(rubbish, |_, sink| sink.zero(0..u64::MAX));
    is_found_out(rubbish, |_, sink| sink.zero(8 * PAGE + 1..9 * PAGE));
}

/// A sink's error is for the source to pass on; one that does not gains nothing by it.
#[test]
fn a_source_that_hides_that_it_was_refused_is_found_out() {
    is_found_out(damaged, |pages, sink| {
        let refused = sink.pages(pages.start * PAGE + 1, &content(pages.start));
        assert!(refused.is_err());
        Ok(())
    });
}

#[test]
fn a_source_may_say_that_pages_are_zero() {
    if !has_userfaultfd() {
        return;
    }
    let faults = faults();
    let zero = |pages: Range<u64>, sink: &mut dyn PageSink| {
        sink.zero(pages.start * PAGE..pages.end * PAGE)
    };
    let image = image_of(&faults, PAGES, &OWN, Liar::new(zero));
    image.complete().unwrap();
    let data = memory::data_extents(image.file()).unwrap();
    assert_eq!(
        data,
        OWN.map(|run| run.start * PAGE..run.end * PAGE),
        "its own only"
    );
    assert!(
        OWN.into_iter()
            .flatten()
            .all(|number| page(&image, number) == [0; PAGE as usize])
    );
}

#[test]
fn a_source_may_deliver_more_than_was_asked_and_only_what_is_its_own_is_taken() {
    let asked = asked_for_the_second_chunk(|_, sink| honest(0..PAGES, sink));
    let Some((image, asked)) = asked else { return };
    asked.unwrap();
    assert!(image.is_whole(), "all that it has");
    let data = memory::data_extents(image.file()).unwrap();
    assert_eq!(data, OWN.map(|run| run.start * PAGE..run.end * PAGE));
}

#[test]
fn a_page_of_an_earlier_image_is_never_taken_from_the_source() {
    if !has_userfaultfd() {
        return;
    }
    let faults = faults();
    let base = image_of(&faults, PAGES, &[0..PAGES], Liar::new(honest));
    let lies = |_: Range<u64>, sink: &mut dyn PageSink| {
        sink.pages(0, &vec![0xbb; (PAGES * PAGE) as usize])
    };
    let table = base.table().unwrap().of(&base);
    let table: OwnerTable = table.with_own(&[4 * PAGE..6 * PAGE]);
    let empty = faults.empty_image(PAGES * PAGE).unwrap();
    let image = faults.image_of(empty, table, Liar::new(lies));
    image.publish(Plan::whole(PAGES * PAGE)).unwrap();
    image.complete().unwrap();
    for number in 0..PAGES {
        let expected = match number {
            4 | 5 => vec![0xbb; PAGE as usize],
            _ => content(number),
        };
        assert!(page(&image, number) == expected, "page {number}");
    }
}

#[test]
fn of_a_page_that_is_delivered_twice_the_first_stays() {
    let asked = asked_for_the_second_chunk(|pages, sink| {
        honest(pages.clone(), sink)?;
        let other = vec![0xee; ((pages.end - pages.start) * PAGE) as usize];
        sink.pages(pages.start * PAGE, &other)?;
        sink.zero(pages.start * PAGE..pages.end * PAGE)
    });
    if let Some((_image, asked)) = asked {
        asked.unwrap();
    }
}

#[test]
fn a_source_that_fails_one_page_costs_only_those_who_need_it() {
    if !has_userfaultfd() {
        return;
    }
    let faults = faults();
    let liar = Liar::new(|pages, sink| {
        if pages.contains(&9) {
            let why = "a hole in the tape".to_owned();
            let (name, offset) = ("liar".to_owned(), 9 * PAGE);
            return Err(SourceError::Damaged { name, offset, why });
        }
        honest(pages, sink)
    });
    let image = image_of(&faults, PAGES, &OWN, liar);
    // All at once, so that they come into one call of the source.
    thread::scope(|scope| {
        for number in [0, 1, 2, 3, 12, 13] {
            let image = &image;
            scope.spawn(move || image.prefetch(number * PAGE).unwrap());
        }
        for number in 8..12 {
            let image = &image;
            scope.spawn(move || {
                let error = image.prefetch(number * PAGE).unwrap_err();
                assert!(error.to_string().contains("a hole in the tape"), "{error}");
            });
        }
    });
    for number in [0, 3, 12, 13] {
        assert!(page(&image, number) == content(number), "page {number}");
    }
}

#[test]
fn a_source_that_panics_is_gone_for_good() {
    // Without the hook, whose backtrace takes longer than the deadline on a busy host.
    let panics = |_: Range<u64>, _: &mut dyn PageSink| std::panic::resume_unwind(Box::new("panic"));
    let Some((image, asked)) = asked_for_the_second_chunk(panics) else {
        return;
    };
    let error = asked.unwrap_err();
    assert!(
        matches!(&error, SourceError::Gone { why, .. } if why.contains("panicked")),
        "{error}"
    );
    let again = image.prefetch(12 * PAGE).unwrap_err();
    assert!(matches!(&again, SourceError::Gone { .. }), "{again}");
    assert!(image.prefetch(0).is_ok(), "what is here is here");
}

#[test]
fn a_source_that_is_gone_is_asked_nothing_more() {
    if !has_userfaultfd() {
        return;
    }
    let faults = faults();
    let liar = Liar::new(|_, _| {
        let (name, why) = ("liar".to_owned(), "it was unplugged".to_owned());
        Err(SourceError::Gone { name, why })
    });
    let image = image_of(&faults, PAGES, &OWN, liar.clone());
    for number in [0, 8, 12, 0] {
        let error = image.prefetch(number * PAGE).unwrap_err();
        assert!(error.to_string().contains("it was unplugged"), "{error}");
    }
    assert_eq!(liar.calls.load(Ordering::Relaxed), 1);
}

/// Holds whoever asks until it is let go.
#[derive(Default)]
pub(super) struct Hold {
    open: Mutex<bool>,
    changed: Condvar,
}

impl Hold {
    pub(super) fn pass(&self) {
        let mut open = self.open.lock().unwrap();
        while !*open {
            open = self.changed.wait(open).unwrap();
        }
    }

    pub(super) fn let_go(&self) {
        *self.open.lock().unwrap() = true;
        self.changed.notify_all();
    }
}

/// An image whose source stalls, and what lets it go on.
fn stalled(faults: &crate::fault::FaultHandler) -> (Arc<MemoryImage>, Arc<Hold>) {
    let hold = Arc::new(Hold::default());
    let held = hold.clone();
    let liar = Liar::new(move |pages, sink| {
        held.pass();
        honest(pages, sink)
    });
    (image_of(faults, PAGES, &OWN, liar), hold)
}

fn expect_silence(waited: Duration, asked: Result<(), SourceError>) {
    let error = asked.unwrap_err();
    assert!(
        matches!(&error, SourceError::Gone { name, why } if name == "liar" && why.contains("no answer")),
        "{error}"
    );
    assert!(waited >= DEADLINE, "{waited:?}");
    assert!(waited < DEADLINE + Duration::from_secs(1), "{waited:?}");
}

#[test]
fn everybody_who_waits_for_a_source_that_stalls_hears_so_within_a_second_of_its_deadline() {
    if !has_userfaultfd() {
        return;
    }
    let faults = faults();
    let (image, hold) = stalled(&faults);
    let asked_at = Instant::now();
    thread::scope(|scope| {
        for number in [0, 8, 9, 12] {
            let image = &image;
            scope.spawn(move || {
                let asked = image.prefetch(number * PAGE);
                expect_silence(asked_at.elapsed(), asked);
            });
        }
    });
    // What comes afterwards is too late for those who waited, and not wrong.
    hold.let_go();
    assert!(image.prefetch(0).is_err() || page(&image, 0) == content(0));
}

#[test]
fn whoever_waits_for_a_source_that_stalls_is_not_lost_when_the_page_came_otherwise() {
    if !has_userfaultfd() {
        return;
    }
    let faults = faults();
    let (image, hold) = stalled(&faults);
    thread::scope(|scope| {
        let (other, image) = (image.clone(), &image);
        let waiting = scope.spawn(move || other.prefetch(8 * PAGE));
        // As a parent does that is about to write them.
        thread::sleep(DEADLINE / 4);
        let pages: Vec<u8> = (8..12).flat_map(content).collect();
        let pages = crate::image::Content::from(&pages[..]);
        let cause = crate::fault::counters::Cause::ParentWrite;
        image.take(&(8 * PAGE..12 * PAGE), pages, cause).unwrap();
        assert!(waiting.join().unwrap().is_ok());
        let lost = image.prefetch(0).unwrap_err();
        assert!(matches!(lost, SourceError::Gone { .. }), "{lost}");
    });
    hold.let_go();
}

#[test]
fn a_deadline_is_kept_however_much_else_the_supervisor_hears() {
    if !has_userfaultfd() {
        return;
    }
    let faults = faults();
    let (image, hold) = stalled(&faults);
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            // Other images of the family fill up.
            let notices = faults.notices();
            while !over.load(Ordering::Relaxed) {
                notices.send(Notice::LastPage).unwrap();
                thread::sleep(Duration::from_millis(10));
            }
        });
        scope.spawn(|| {
            // So that a deadline that is missed does not hang the test.
            thread::sleep(DEADLINE + Duration::from_secs(3));
            hold.let_go();
        });
        let asked_at = Instant::now();
        let asked = image.prefetch(0);
        over.store(true, Ordering::Relaxed);
        hold.let_go();
        expect_silence(asked_at.elapsed(), asked);
    });
}

#[test]
fn a_slow_source_that_keeps_its_deadline_is_waited_for() {
    if !has_userfaultfd() {
        return;
    }
    let faults = faults();
    let liar = Liar::new(|pages, sink| {
        thread::sleep(DEADLINE / 10);
        honest(pages, sink)
    });
    let image = image_of(&faults, PAGES, &OWN, liar);
    image.complete().unwrap();
    for number in OWN.into_iter().flatten() {
        assert!(page(&image, number) == content(number), "page {number}");
    }
}

#[test]
fn a_source_that_delivers_without_a_pause_is_not_silent_however_long_it_takes() {
    if !has_userfaultfd() {
        return;
    }
    let faults = faults();
    let liar = Liar::new(|pages, sink| {
        for number in pages {
            thread::sleep(DEADLINE / 2);
            honest(number..number + 1, sink)?;
        }
        Ok(())
    });
    let image = image_of(&faults, PAGES, &OWN, liar);
    image.prefetch(8 * PAGE).unwrap();
    assert!((8..12).all(|number| page(&image, number) == content(number)));
}

/// Has some pages in memory, and the others not.
struct Half(Vec<u8>);

impl PageSource for Half {
    fn name(&self) -> String {
        "half".into()
    }

    fn fetch(&self, ranges: &[Range<u64>], sink: &mut dyn PageSink) -> Result<(), SourceError> {
        assert!(
            ranges.iter().all(|range| range.start >= 8 * PAGE),
            "{ranges:?}"
        );
        for range in ranges {
            honest(range.start / PAGE..range.end / PAGE, sink)?;
        }
        Ok(())
    }

    fn local(&self, range: &Range<u64>, show: &mut dyn FnMut(VolatileSlice<'_>)) -> bool {
        let near = range.end <= 8 * PAGE;
        if near {
            let mut bytes = self.0[range.start as usize..range.end as usize].to_vec();
            show(VolatileSlice::from(&mut bytes[..]));
        }
        near
    }
}

#[test]
fn a_source_may_have_some_of_its_pages_at_hand_and_some_not() {
    if !has_userfaultfd() {
        return;
    }
    let faults = faults();
    let half = Half((0..8).flat_map(content).collect());
    let image = image_of(&faults, PAGES, &OWN, Arc::new(half));
    image.complete().unwrap();
    for number in OWN.into_iter().flatten() {
        assert!(page(&image, number) == content(number), "page {number}");
    }
}
