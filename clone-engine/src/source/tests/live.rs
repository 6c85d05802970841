//! The memory of a VM that runs as a source; the VM is a thread of the test that writes.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use forkvm_vmm::memory::PAGE;
use forkvm_vmm::{MemoryLayout, Ram};
use vm_memory::{Bytes, GuestAddress};

use super::super::live_parent::LiveParent;
use super::super::{PageSink, PageSource, SourceError};
use super::kit::conforms;
use super::{content, faults, has_userfaultfd, page};
use crate::fault::FaultHandler;
use crate::fault::fetcher::{Nobody, Waiter};
use crate::image::{MemoryImage, OwnerTable, Plan, Provided};
use crate::vm_memory::VmMemory;

const MIB: u64 = 16;
const LEN: u64 = MIB << 20;
const OWN: [std::ops::Range<u64>; 3] = [3..5, 16..128, 400..401];

fn bytes() -> [std::ops::Range<u64>; 3] {
    OWN.map(|run| run.start * PAGE..run.end * PAGE)
}

/// Memory without a VM around it.
struct Parent {
    faults: FaultHandler,
    ram: Ram,
    memory: Arc<VmMemory>,
}

impl Parent {
    fn new() -> Parent {
        let faults = faults();
        let mut ram = Ram::new(MemoryLayout::new(MIB).unwrap()).unwrap();
        for number in OWN.into_iter().flatten() {
            let address = GuestAddress(number * PAGE);
            ram.guest().write_slice(&content(number), address).unwrap();
        }
        let lose = Box::new(|why: &SourceError| panic!("lost: {why}"));
        let memory = VmMemory::new("parent", &mut ram, &faults, lose);
        Parent {
            faults,
            ram,
            memory,
        }
    }

    fn live(&self) -> LiveParent {
        LiveParent::new(self.memory.clone())
    }

    /// Freezes it: the memory may be written from then on.
    fn fork(&self) -> Arc<MemoryImage> {
        self.fork_from(Arc::new(self.live()))
    }

    /// The same, but that pages are asked of `source`.
    fn fork_from(&self, source: Arc<dyn PageSource>) -> Arc<MemoryImage> {
        let table = OwnerTable::own(LEN, &bytes());
        let empty = self.faults.empty_image(LEN).unwrap();
        let protect = Some(&bytes()[..]);
        let image = self
            .memory
            .feed(&self.faults, empty, table, source, protect)
            .unwrap();
        self.faults.look_after(&image);
        image.publish(Plan::whole(LEN)).unwrap();
        image
    }

    fn write(&self, number: u64, byte: u8) {
        let address = GuestAddress(number * PAGE);
        let page = [byte; PAGE as usize];
        self.ram.guest().write_slice(&page, address).unwrap();
    }

    fn read(&self, number: u64) -> Vec<u8> {
        let mut page = vec![0; PAGE as usize];
        let address = GuestAddress(number * PAGE);
        self.ram.guest().read_slice(&mut page, address).unwrap();
        page
    }
}

/// What a fault at page `number` of a clone of `image` comes to.
fn touch(image: &Arc<MemoryImage>, number: u64) -> Result<Provided, SourceError> {
    let nobody: Arc<dyn Waiter> = Arc::new(Nobody);
    image.provide(number * PAGE, &nobody)
}

#[test]
fn a_live_parent_conforms() {
    conforms(&Parent::new().live(), LEN, &OWN);
}

#[test]
fn a_live_parent_is_at_hand() {
    let source = Parent::new().live();
    assert!(source.local(&(3 * PAGE..5 * PAGE), &mut |_| ()));
}

#[test]
fn an_image_holds_what_stood_there_at_the_fork_however_the_parent_writes() {
    if !has_userfaultfd() {
        return;
    }
    for round in 0..10 {
        let parent = Parent::new();
        let image = parent.fork();
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                let mut pages: Vec<u64> = OWN.into_iter().flatten().collect();
                for byte in (1..=u8::MAX).cycle() {
                    // From the end, then from the start: so that it meets whoever fills.
                    pages.reverse();
                    for number in &pages {
                        if over.load(Ordering::Relaxed) {
                            return;
                        }
                        parent.write(*number, byte);
                    }
                }
            });
            if round % 2 == 0 {
                for number in OWN.into_iter().flatten().rev() {
                    image.prefetch(number * PAGE).unwrap();
                }
            }
            image.complete().unwrap();
            over.store(true, Ordering::Relaxed);
        });
        for number in OWN.into_iter().flatten() {
            assert!(page(&image, number) == content(number), "page {number}");
        }
        let data = forkvm_vmm::memory::data_extents(image.file()).unwrap();
        assert_eq!(data, bytes());
    }
}

#[test]
fn two_images_of_one_parent_each_hold_their_own_instant() {
    if !has_userfaultfd() {
        return;
    }
    let parent = Parent::new();
    let first = parent.fork();
    parent.write(20, 1);
    let second = parent.fork();
    parent.write(20, 2);
    parent.write(30, 2);
    first.complete().unwrap();
    second.complete().unwrap();
    assert!(page(&first, 20) == content(20));
    assert_eq!(page(&second, 20), [1; PAGE as usize]);
    assert!(page(&first, 30) == content(30) && page(&second, 30) == content(30));
}

#[test]
fn what_the_parent_does_not_write_is_not_copied() {
    if !has_userfaultfd() {
        return;
    }
    let parent = Parent::new();
    let image = parent.fork();
    assert_eq!(image.pages_present(), 0);
    parent.write(400, 1);
    assert_eq!(image.pages_present(), 1);
    assert_eq!(parent.faults.figures().pages_by_parent_write, 1);
    // Never populated, so never protected.
    parent.write(1000, 1);
    assert_eq!(image.pages_present(), 1);
}

#[test]
fn pages_that_the_parent_gives_back_reach_the_image_first() {
    if !has_userfaultfd() {
        return;
    }
    let parent = Parent::new();
    let image = parent.fork();
    let part = 16 * PAGE..64 * PAGE;
    let given = parent.memory.give_back(&parent.ram, &parent.faults, &part);
    assert_eq!(given.unwrap(), 48);
    let mut now = [1; 8];
    parent
        .ram
        .guest()
        .read_slice(&mut now, GuestAddress(20 * PAGE))
        .unwrap();
    assert_eq!(now, [0; 8], "it reads as zero from then on");
    image.complete().unwrap();
    for number in OWN.into_iter().flatten() {
        assert!(page(&image, number) == content(number), "page {number}");
    }
}

/// Cannot deliver one page, nor what is asked for together with it.
struct Damaged {
    of: LiveParent,
    page: u64,
}

impl PageSource for Damaged {
    fn name(&self) -> String {
        "damaged".into()
    }

    fn fetch(
        &self,
        ranges: &[std::ops::Range<u64>],
        sink: &mut dyn PageSink,
    ) -> Result<(), SourceError> {
        let offset = self.page * PAGE;
        if ranges.iter().any(|range| range.contains(&offset)) {
            let (name, why) = (self.name(), "as the test says".into());
            return Err(SourceError::Damaged { name, offset, why });
        }
        self.of.fetch(ranges, sink)
    }
}

/// Page 41, of a chunk of four, cannot be had.
fn expect_all_but_41(image: &Arc<MemoryImage>) {
    assert_eq!(image.own_left(), 1);
    for number in OWN.into_iter().flatten().filter(|number| *number != 41) {
        assert!(page(image, number) == content(number), "page {number}");
        let touched = touch(image, number);
        assert!(matches!(touched, Ok(Provided::Here(_))), "page {number}");
    }
    let lost = touch(image, 41).unwrap_err().to_string();
    assert!(lost.contains("VM parent cannot deliver"), "{lost}");
    assert!(lost.contains("as the test says"), "{lost}");
    assert!(lost.ends_with("lost for good: 1"), "{lost}");
    assert!(page(image, 41) == [0; PAGE as usize], "it stays a hole");
}

#[test]
fn a_page_that_cannot_be_had_when_its_parent_ends_costs_the_image_that_page_alone() {
    if !has_userfaultfd() {
        return;
    }
    let parent = Parent::new();
    let of = parent.live();
    let image = parent.fork_from(Arc::new(Damaged { of, page: 41 }));
    parent.memory.close();
    expect_all_but_41(&image);
}

#[test]
fn a_page_that_cannot_be_had_when_room_is_made_costs_the_oldest_image_that_page_alone() {
    if !has_userfaultfd() {
        return;
    }
    let parent = Parent::new();
    let [first, second] = [(); 2].map(|()| {
        let of = parent.live();
        parent.fork_from(Arc::new(Damaged { of, page: 41 }))
    });
    parent.memory.make_room();
    assert_eq!(second.pages_present(), 0, "there is room for it");
    parent.write(41, 1);
    parent.write(20, 1);
    expect_all_but_41(&first);
    // The parent's own write has brought it to the other.
    second.complete().unwrap();
    for number in OWN.into_iter().flatten() {
        assert!(page(&second, number) == content(number), "page {number}");
    }
}

#[test]
fn a_page_that_an_earlier_image_lacks_for_good_costs_a_later_one_that_page_alone() {
    if !has_userfaultfd() {
        return;
    }
    let parent = Parent::new();
    let of = parent.live();
    let base = parent.fork_from(Arc::new(Damaged { of, page: 41 }));
    parent.memory.close();
    let table = base.table().unwrap().of(&base);
    let empty = parent.faults.empty_image(LEN).unwrap();
    let later = parent
        .faults
        .image_of(empty, table, Arc::new(parent.live()));
    later.publish(Plan::whole(LEN)).unwrap();
    for number in [40, 42, 43, 20, 400] {
        let touched = touch(&later, number);
        assert!(matches!(touched, Ok(Provided::Here(_))), "page {number}");
        assert!(page(&later, number) == content(number), "page {number}");
    }
    let lost = touch(&later, 41).unwrap_err().to_string();
    assert!(lost.contains("as the test says"), "{lost}");
}

/// More than enough for a thread to be replaced.
const LATE: Duration = Duration::from_secs(20);

#[test]
fn a_handler_that_dies_of_a_parents_write_costs_neither_the_write_nor_what_images_hold() {
    if !has_userfaultfd() {
        return;
    }
    let parent = Arc::new(Parent::new());
    let images = [parent.fork(), parent.fork()];
    // The first of them has the page when the handler dies, the second has not.
    for number in [20, 100] {
        parent.memory.deaths_by_writes.store(1, Ordering::Relaxed);
        let (written, done) = channel();
        let writer = parent.clone();
        thread::spawn(move || {
            writer.write(number, 7);
            written.send(()).unwrap();
        });
        let done = done.recv_timeout(LATE);
        assert!(done.is_ok(), "the write of page {number} hangs");
        let left = parent.memory.deaths_by_writes.load(Ordering::Relaxed);
        assert_eq!(left, 0, "a handler has died");
        assert_eq!(parent.read(number), [7; PAGE as usize]);
        for image in &images {
            assert!(page(image, number) == content(number), "page {number}");
        }
    }
    // No lock of the VM went with them: it can be forked, and its writes are seen.
    let third = parent.fork();
    parent.write(20, 8);
    third.complete().unwrap();
    assert_eq!(page(&third, 20), [7; PAGE as usize]);
    for image in &images {
        image.complete().unwrap();
        for number in OWN.into_iter().flatten() {
            assert!(page(image, number) == content(number), "page {number}");
        }
    }
}

#[test]
fn a_parent_whose_memory_is_gone_says_so_and_delivers_no_zeros() {
    let parent = Parent::new();
    let source = parent.live();
    parent.memory.close();
    let mut kept = super::kit::Kept::new(LEN);
    let error = source.fetch(&bytes(), &mut kept).unwrap_err();
    assert!(matches!(error, SourceError::Gone { .. }), "{error}");
    assert!(kept.is_empty());
    assert!(!source.local(&bytes()[0], &mut |_| panic!("it was shown")));
}

/// Passes on, by way of a thread of its own, what another source has.
struct Far<S> {
    of: S,
    gone: Arc<AtomicBool>,
    asked: Mutex<BTreeSet<u64>>,
}

impl<S: PageSource> PageSource for Far<S> {
    fn name(&self) -> String {
        "far".into()
    }

    fn fetch(
        &self,
        ranges: &[std::ops::Range<u64>],
        sink: &mut dyn PageSink,
    ) -> Result<(), SourceError> {
        self.asked
            .lock()
            .unwrap()
            .extend(ranges.iter().map(|range| range.start));
        self.of.fetch(ranges, sink)
    }
}

impl<S> Drop for Far<S> {
    fn drop(&mut self) {
        self.gone.store(true, Ordering::Release);
    }
}

fn soon(what: impl Fn() -> bool) -> bool {
    let until = Instant::now() + Duration::from_secs(5);
    while !what() && Instant::now() < until {
        thread::sleep(Duration::from_millis(5));
    }
    what()
}

#[test]
fn a_far_source_is_let_go_when_the_image_has_all_its_pages() {
    if !has_userfaultfd() {
        return;
    }
    let parent = Parent::new();
    let gone = Arc::new(AtomicBool::new(false));
    let far = Arc::new(Far {
        of: parent.live(),
        gone: gone.clone(),
        asked: Mutex::default(),
    });
    let image = super::image_of(&parent.faults, LEN / PAGE, &OWN, far);
    image.complete().unwrap();
    for number in OWN.into_iter().flatten() {
        assert!(page(&image, number) == content(number), "page {number}");
    }
    // The image lives; its source would keep a connection, or the memory of a VM.
    assert!(soon(|| gone.load(Ordering::Acquire)));
}

#[test]
fn a_live_parent_is_let_go_when_the_image_has_all_its_pages() {
    if !has_userfaultfd() {
        return;
    }
    let parent = Parent::new();
    let image = parent.fork();
    let memory = Arc::downgrade(&parent.memory);
    image.complete().unwrap();
    let Parent {
        memory: held, ram, ..
    } = parent;
    drop((held, ram));
    assert!(soon(|| memory.strong_count() == 0));
    assert!(page(&image, 3) == content(3));
}
