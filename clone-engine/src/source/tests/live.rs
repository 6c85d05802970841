//! The memory of a VM that runs as a source; the VM is a thread of the test that writes.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use forkvm_vmm::memory::PAGE;
use forkvm_vmm::{MemoryLayout, Ram};
use vm_memory::{Bytes, GuestAddress};

use super::super::PageSource;
use super::super::live_parent::LiveParent;
use super::kit::conforms;
use super::{content, faults, has_userfaultfd, page};
use crate::fault::FaultHandler;
use crate::image::{MemoryImage, OwnerTable, Plan};
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
        let lose = Box::new(|why: &super::super::SourceError| panic!("lost: {why}"));
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
        let (table, live) = (OwnerTable::own(LEN, &bytes()), Arc::new(self.live()));
        let empty = self.faults.empty_image(LEN).unwrap();
        let protect = Some(&bytes()[..]);
        let image = self
            .memory
            .feed(&self.faults, empty, table, live, protect)
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

#[test]
fn a_parent_whose_memory_is_gone_says_so_and_delivers_no_zeros() {
    let parent = Parent::new();
    let source = parent.live();
    parent.memory.close();
    let mut kept = super::kit::Kept::new(LEN);
    let error = source.fetch(&bytes(), &mut kept).unwrap_err();
    assert!(
        matches!(error, super::super::SourceError::Gone { .. }),
        "{error}"
    );
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
        sink: &mut dyn super::super::PageSink,
    ) -> Result<(), super::super::SourceError> {
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
