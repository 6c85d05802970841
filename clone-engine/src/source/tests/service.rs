//! In which order a source is asked for pages, and how fast an image is filled in the background.

use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use forkvm_vmm::memory::PAGE;
use vm_memory::VolatileSlice;

use super::super::{PageSink, PageSource, SourceError};
use super::liars::{Hold, Liar, honest};
use super::{has_userfaultfd, image_of, page};
use crate::fault::counters::Cause;
use crate::fault::fetcher::{Arrival, Waiter};
use crate::fault::{FaultConfig, FaultHandler};
use crate::image::{Provided, Which};
use crate::working_set::WorkingSetPolicy;

/// Far beyond what anything here takes.
const LONG: Duration = Duration::from_secs(60);

fn faults(background: Option<u32>, chunk: u64) -> FaultHandler {
    let config = FaultConfig {
        chunk,
        readahead: 0,
        working_set: WorkingSetPolicy::Off,
        shards: 1,
        background,
        page_deadline: LONG,
    };
    FaultHandler::new(config, None)
}

fn wait_until(what: impl Fn() -> bool) {
    let start = Instant::now();
    while !what() {
        assert!(start.elapsed() < LONG, "it never comes to that");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn what_clones_wait_for_is_fetched_first_then_what_is_expected_and_then_the_rest() {
    if !has_userfaultfd() {
        return;
    }
    let (hold, asked) = (Arc::new(Hold::default()), Arc::new(Mutex::new(Vec::new())));
    let (held, calls) = (hold.clone(), asked.clone());
    let source = Liar::new(move |pages, sink| {
        calls.lock().unwrap().push(pages.clone());
        held.pass();
        honest(pages, sink)
    });
    let faults = faults(None, 4 * PAGE);
    let image = image_of(&faults, 16, &[0..16], source);
    let clone = Arc::new(Arrival::default());
    thread::scope(|scope| {
        // The source has its hands full with this.
        scope.spawn(|| image.prefetch(0).unwrap());
        wait_until(|| !asked.lock().unwrap().is_empty());
        // The least urgent comes first.
        scope.spawn(|| {
            let next = image.fill_next(4 * PAGE, Which::All, Cause::Background);
            let (range, filled) = next.unwrap();
            filled.unwrap();
            assert_eq!(range, 4 * PAGE..8 * PAGE);
        });
        thread::sleep(Duration::from_millis(100));
        image
            .provide_ahead(&(8 * PAGE..12 * PAGE), |_brought| ())
            .unwrap();
        let waiter: Arc<dyn Waiter> = clone.clone();
        let missed = image.provide(12 * PAGE, &waiter).unwrap();
        assert!(matches!(missed, Provided::Coming(_)), "{missed:?}");
        hold.let_go();
        clone.wait().unwrap();
    });
    wait_until(|| image.is_whole());
    assert_eq!(*asked.lock().unwrap(), [0..4, 12..16, 8..12, 4..8]);
}

/// Pages that are at hand, all the same.
struct Same;

impl PageSource for Same {
    fn name(&self) -> String {
        "same".into()
    }

    fn fetch(&self, _: &[Range<u64>], _: &mut dyn PageSink) -> Result<(), SourceError> {
        unreachable!("all is at hand")
    }

    fn local(&self, range: &Range<u64>, show: &mut dyn FnMut(VolatileSlice<'_>)) -> bool {
        let mut bytes = vec![0xaa; (range.end - range.start) as usize];
        show(VolatileSlice::from(&mut bytes[..]));
        true
    }
}

const MIB: u64 = 1 << 20;

/// MiB a second.
const RATE: u32 = 16;

#[test]
fn an_image_is_filled_in_the_background_no_faster_than_it_may_be() {
    if !has_userfaultfd() {
        return;
    }
    let pages = 64 * MIB / PAGE;
    // In large pieces, so that it could be much faster.
    let faults = faults(Some(RATE), MIB);
    let image = image_of(&faults, pages, &[0..pages], Arc::new(Same));
    let start = Instant::now();
    faults.fill_in_background(&image);
    wait_until(|| image.pages_present() > 0);
    thread::sleep(Duration::from_secs(1).saturating_sub(start.elapsed()));
    let brought = image.pages_present() * PAGE;
    // Looked at later, so that a slow host proves no less; and it rests after each MiB, not before.
    let seconds = start.elapsed().as_secs_f64();
    let most = (f64::from(RATE) * seconds + 1.0) * MIB as f64;
    println!("{brought} bytes in {seconds} s, at most {most}");
    assert!(brought as f64 <= most, "{brought} bytes in {seconds} s");
    assert!(page(&image, 0) == [0xaa; PAGE as usize]);
}

#[test]
fn an_image_is_not_filled_in_the_background_where_that_is_not_wanted() {
    if !has_userfaultfd() {
        return;
    }
    let (wanted, unwanted) = (faults(Some(1000), PAGE), faults(None, PAGE));
    let image_by = |faults: &FaultHandler| {
        let image = image_of(faults, 64, &[0..64], Arc::new(Same));
        faults.fill_in_background(&image);
        image
    };
    let (left, filled) = (image_by(&unwanted), image_by(&wanted));
    wait_until(|| filled.is_whole());
    assert_eq!(left.pages_present(), 0);
}
