//! What keeps an image immutable, and what enters it; without a VM.
#![allow(clippy::single_range_in_vec_init)] // Lists of ranges, some of one.
#![allow(unsafe_code)] // Attempts to write to an image in ways that the kernel must refuse.

use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use forkvm_vmm::{Backing, MemoryLayout, Ram};

use super::*;
use crate::check_userfaultfd;
use crate::fault::FaultHandler;
use crate::fault::counters::Cause;
use crate::fault::fetcher::{Arrival, Waiter};
use crate::source::PageSink;

const PAGES: u64 = 64;
const LEN: u64 = PAGES * PAGE;
const LONG: Duration = Duration::from_secs(20);

/// Whether this host has what a filling image needs; says so where it has not.
fn has_userfaultfd() -> bool {
    let checked = check_userfaultfd();
    if let Err(error) = &checked {
        println!("skipped: {error}");
    }
    checked.is_ok()
}

fn faults() -> FaultHandler {
    let config = FaultConfig {
        background: None,
        ..FaultConfig::default()
    };
    FaultHandler::new(config, None)
}

/// A source of which nothing is asked.
struct Nothing;

impl PageSource for Nothing {
    fn name(&self) -> String {
        "nothing".into()
    }

    fn fetch(&self, ranges: &[Range<u64>], _sink: &mut dyn PageSink) -> Result<(), SourceError> {
        panic!("{ranges:?} were asked for");
    }
}

/// A published image of which the pages `own` are missing; all others are zero.
fn empty_image(faults: &FaultHandler, own: &Range<u64>) -> Arc<MemoryImage> {
    let table = OwnerTable::own(LEN, &[own.start * PAGE..own.end * PAGE]);
    let empty = faults.empty_image(LEN).unwrap();
    let image = faults.image_of(empty, table, Arc::new(Nothing));
    image.publish(Plan::whole(LEN)).unwrap();
    image
}

fn take(image: &MemoryImage, pages: Range<u64>, byte: u8) {
    let content = vec![byte; ((pages.end - pages.start) * PAGE) as usize];
    let range = pages.start * PAGE..pages.end * PAGE;
    let content = Content::from(&content[..]);
    image.take(&range, content, Cause::Background).unwrap();
}

fn page(image: &MemoryImage, number: u64) -> Vec<u8> {
    let mut page = vec![0; PAGE as usize];
    image
        .file()
        .read_exact_at(&mut page, number * PAGE)
        .unwrap();
    page
}

fn last_errno() -> Option<i32> {
    io::Error::last_os_error().raw_os_error()
}

/// The descriptor that is open for writing, and leaves its module nowhere but here.
fn writable(image: &MemoryImage) -> File {
    image.store.writable().expect("it fills")
}

/// Tries every way to change an image that does not go through its module, by a descriptor that is open for writing.
fn expect_unwritable(file: &File) {
    let refused = file.write_at(&[1; 16], 0).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EPERM), "pwrite");
    let fd = file.as_raw_fd();
    // SAFETY: the call touches no memory of this process.
    let punched = unsafe {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        libc::fallocate(fd, mode, 0, PAGE as libc::off_t)
    };
    assert_eq!((punched, last_errno()), (-1, Some(libc::EPERM)), "a hole");
    assert_eq!(
        map_shared_to_write(file),
        Some(libc::EPERM),
        "a shared mapping that can be written"
    );
    let refused = file.set_len(2 * LEN).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EPERM), "growth");
    let refused = file.set_len(0).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EPERM), "shrinking");
}

/// Why a shared mapping of the file that can be written is refused.
fn map_shared_to_write(file: &File) -> Option<i32> {
    // SAFETY: a new mapping at an address of the kernel's choice; it must not come to be.
    let mapped = unsafe {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        libc::mmap(
            std::ptr::null_mut(),
            LEN as usize,
            prot,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        )
    };
    assert_eq!(mapped, libc::MAP_FAILED, "it can be written");
    last_errno()
}

fn seals(image: &MemoryImage) -> libc::c_int {
    // SAFETY: the descriptor is open; the call touches no memory.
    unsafe { libc::fcntl(image.file().as_raw_fd(), libc::F_GET_SEALS) }
}

#[test]
fn nothing_but_an_insertion_changes_an_image_from_its_creation_on() {
    if !has_userfaultfd() {
        return;
    }
    let faults = faults();
    let image = empty_image(&faults, &(0..PAGES));
    let writable = writable(&image);
    expect_unwritable(&writable);
    take(&image, 0..1, 7);
    expect_unwritable(&writable);
    assert_eq!(page(&image, 0), [7; PAGE as usize]);
    assert_eq!(seals(&image) & libc::F_SEAL_WRITE, 0, "it still fills");
}

#[test]
fn the_file_that_others_have_of_an_image_that_fills_is_open_for_reading_only() {
    if !has_userfaultfd() {
        return;
    }
    let faults = faults();
    let image = empty_image(&faults, &(0..PAGES));
    take(&image, 0..1, 7);
    // SAFETY: the descriptor is open; the call touches no memory.
    let flags = unsafe { libc::fcntl(image.file().as_raw_fd(), libc::F_GETFL) };
    assert_eq!(flags & libc::O_ACCMODE, libc::O_RDONLY);
    // Not for the seals that both have.
    let refused = image.file().write_at(&[1; 16], 0).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EBADF));
    assert_eq!(map_shared_to_write(image.file()), Some(libc::EACCES));
    assert_eq!(page(&image, 0), [7; PAGE as usize]);
}

#[test]
fn an_image_is_sealed_against_all_writing_when_its_last_page_has_come() {
    if !has_userfaultfd() {
        return;
    }
    let faults = faults();
    let image = empty_image(&faults, &(0..PAGES));
    let writable = writable(&image);
    take(&image, 0..PAGES - 1, 1);
    assert!(!image.is_whole());
    image.settle();
    assert_eq!(seals(&image) & libc::F_SEAL_WRITE, 0);
    take(&image, PAGES - 1..PAGES, 1);
    assert!(image.is_whole());
    image.settle();
    // The fault handler's supervisor may have been first, and is at it. The seal is refused as long as anybody could write: that
    // it is there proves that nobody can.
    let start = Instant::now();
    while seals(&image) & libc::F_SEAL_WRITE == 0 {
        assert!(start.elapsed() < LONG, "it is not sealed");
        thread::sleep(Duration::from_millis(1));
    }
    expect_unwritable(&writable);
    assert!(image.store.writable().is_none(), "it is closed");
    image.settle();
    image.seal().unwrap();
}

#[test]
fn a_stray_writer_of_an_image_is_found_when_it_is_sealed() {
    let ram = Ram::new(MemoryLayout::new(16).unwrap()).unwrap();
    let file = ram.backing().shared().unwrap().clone();
    let image = MemoryImage::whole(file.clone(), ram.layout().len());
    let error = image.seal().unwrap_err();
    let MemoryError::Seal(why) = &error else {
        panic!("{error}");
    };
    assert_eq!(why.raw_os_error(), Some(libc::EBUSY));
    drop(ram);
    let private = Ram::map(
        MemoryLayout::new(16).unwrap(),
        Backing::Private(Arc::new(file)),
    );
    image.seal().unwrap();
    drop(private);
}

#[test]
fn of_threads_that_insert_the_same_page_the_first_wins_and_nobody_sees_a_mixture() {
    const THREADS: u8 = 4;
    if !has_userfaultfd() {
        return;
    }
    let faults = faults();
    for _ in 0..20 {
        let image = empty_image(&faults, &(0..PAGES));
        let start = Barrier::new(usize::from(THREADS) + 1);
        thread::scope(|scope| {
            for writer in 1..=THREADS {
                let (image, start) = (&image, &start);
                scope.spawn(move || {
                    start.wait();
                    // In pieces of different sizes, so that some meet pages that are there already.
                    let step = usize::from(writer);
                    for from in (0..PAGES).step_by(step) {
                        take(image, from..(from + u64::from(writer)).min(PAGES), writer);
                    }
                });
            }
            start.wait();
            let mut seen = [0; PAGES as usize];
            while !image.is_whole() {
                for number in 0..PAGES {
                    let page = page(&image, number);
                    assert!(
                        page.iter().all(|byte| *byte == page[0]),
                        "page {number} is torn"
                    );
                    let before = std::mem::replace(&mut seen[number as usize], page[0]);
                    assert!(
                        before == 0 || before == page[0],
                        "page {number} has changed"
                    );
                }
            }
        });
        assert_eq!(image.pages_present(), PAGES);
        assert!(image.is_fed(), "each page is counted once");
        for number in 0..PAGES {
            let page = page(&image, number);
            assert!((1..=THREADS).contains(&page[0]) && page.iter().all(|byte| *byte == page[0]));
        }
    }
    let figures = faults.figures();
    assert_eq!(figures.pages_by_background, 20 * PAGES);
}

#[test]
fn a_page_that_was_a_hole_at_the_freeze_is_answered_and_never_stored() {
    if !has_userfaultfd() {
        return;
    }
    let faults = faults();
    let image = empty_image(&faults, &(8..10));
    let waiter: Arc<dyn Waiter> = Arc::new(Arrival::default());
    for (offset, expected) in [
        (0, 0..8 * PAGE),
        (7 * PAGE, 7 * PAGE..8 * PAGE),
        (10 * PAGE, 10 * PAGE..LEN),
    ] {
        match image.provide(offset, &waiter).unwrap() {
            Provided::Zero(range) => assert_eq!(range, expected),
            other => panic!("{other:?}"),
        }
    }
    // Neither when somebody delivers them.
    take(&image, 0..PAGES, 5);
    let data = memory::data_extents(image.file()).unwrap();
    assert_eq!(data, [8 * PAGE..10 * PAGE]);
    assert_eq!(image.populated().unwrap(), 2 * PAGE);
    assert!(image.is_whole());
    match image.provide(0, &waiter).unwrap() {
        Provided::Zero(_) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_enters_after_the_image_is_whole_changes_nothing() {
    if !has_userfaultfd() {
        return;
    }
    let faults = faults();
    let image = empty_image(&faults, &(0..4));
    take(&image, 0..4, 1);
    image.settle();
    take(&image, 0..4, 2);
    assert!((0..4).all(|number| page(&image, number) == [1; PAGE as usize]));
}

#[test]
fn pages_of_earlier_images_come_by_way_of_them_and_stay_in_both() {
    if !has_userfaultfd() {
        return;
    }
    let faults = faults();
    let first = empty_image(&faults, &(0..16));
    take(&first, 0..16, 1);
    let table = first.table().unwrap().of(&first);
    let table = table
        .with_own(&[4 * PAGE..8 * PAGE])
        .with_zero(&[0..2 * PAGE]);
    let second = faults.image_of(faults.empty_image(LEN).unwrap(), table, Arc::new(Nothing));
    second.publish(Plan::whole(LEN)).unwrap();
    take(&second, 0..16, 2);
    assert!(second.is_fed(), "its own pages are here");
    assert!(!second.is_whole(), "those of the first are not");
    second.complete().unwrap();
    assert!(second.is_whole());
    let bytes: Vec<u8> = (0..17).map(|number| page(&second, number)[0]).collect();
    assert_eq!(bytes, [0, 0, 1, 1, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 0]);
    assert_eq!(second.pages_present(), 14, "zero pages are nowhere stored");
}

#[test]
fn an_image_goes_with_its_last_user() {
    if !has_userfaultfd() {
        return;
    }
    let faults = faults();
    let image = empty_image(&faults, &(0..4));
    let file = Arc::downgrade(image.file());
    let later = OwnerTable::own(LEN, &[]).with_own(&[0..PAGE]).of(&image);
    drop(image);
    assert!(
        file.upgrade().is_some(),
        "a later image of its line still names it"
    );
    drop(later);
    assert!(file.upgrade().is_none());
}
