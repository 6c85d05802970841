//! Both ways against a model of the mapping, and so against each other.
#![allow(unsafe_code)] // madvise and userfaultfd on a mapping of the test.

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::slice::from_ref;
use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::super::{MemoryLayout, PAGE, RamRegion, memfd};
use super::*;

/// Pages of each of the two regions: more than one page table, and no whole number of them.
const PAGES: u64 = 1300;

/// Two regions with a gap in guest-physical addresses, of a file whose even pages hold data.
fn ram() -> Ram {
    let region = |start, offset| RamRegion {
        start,
        len: PAGES * PAGE,
        offset,
        page_size: PAGE,
    };
    let second = PAGES * PAGE;
    let regions = vec![region(0, 0), region(4 * second, second)];
    private(MemoryLayout { regions })
}

fn private(layout: MemoryLayout) -> Ram {
    let file = memfd(c"test", layout.len()).unwrap();
    for page in (0..(layout.len() / PAGE).min(2 * PAGES)).step_by(2) {
        file.write_all_at(&[7], page * PAGE).unwrap();
    }
    Ram::map(layout, Backing::Private(Arc::new(Arc::new(file)))).unwrap()
}

/// Host address of the page at file offset `page * PAGE`.
fn host(ram: &Ram, page: u64) -> *mut u8 {
    let offset = page * PAGE;
    ram.host_ranges()
        .find(|(region, _)| (region.offset..region.offset + region.len).contains(&offset))
        .map(|(region, address)| address.wrapping_add((offset - region.offset) as usize))
        .unwrap()
}

fn guest(ram: &Ram, page: u64) -> GuestAddress {
    let offset = page * PAGE;
    ram.layout()
        .regions()
        .iter()
        .find(|region| (region.offset..region.offset + region.len).contains(&offset))
        .map(|region| GuestAddress(region.start + offset - region.offset))
        .unwrap()
}

fn write(ram: &Ram, page: u64) {
    ram.guest().write_obj(9u8, guest(ram, page)).unwrap();
}

fn read(ram: &Ram, page: u64) -> u8 {
    ram.guest().read_obj(guest(ram, page)).unwrap()
}

fn drop_page(ram: &Ram, page: u64) {
    let start = host(ram, page).cast();
    // SAFETY: a page of the mapping, which only the test uses.
    let done = unsafe { libc::madvise(start, PAGE as usize, libc::MADV_DONTNEED) };
    assert_eq!(done, 0);
}

/// By PAGEMAP_SCAN; `None` where the kernel lacks it.
fn by_scan(ram: &Ram) -> Option<Vec<Range<u64>>> {
    let pagemap = File::open(PAGEMAP).unwrap();
    scan::is_supported(&pagemap).then(|| {
        ram.pages_by(|mapping, add| scan::pages(&pagemap, mapping, Wanted::Own, add))
            .unwrap()
    })
}

fn by_entries(ram: &Ram) -> Vec<Range<u64>> {
    let pagemap = File::open(PAGEMAP).unwrap();
    ram.pages_by(|mapping, add| own_by_entries(&pagemap, mapping, add))
        .unwrap()
}

fn assert_own(ram: &Ram, pages: &BTreeSet<u64>) {
    let mut expected = Vec::new();
    for page in pages {
        extend(&mut expected, page * PAGE..(page + 1) * PAGE);
    }
    assert_eq!(by_entries(ram), expected, "by the entries of pagemap");
    if let Some(found) = by_scan(ram) {
        assert_eq!(found, expected, "by PAGEMAP_SCAN");
    }
    assert_eq!(
        ram.own_pages().unwrap(),
        expected,
        "by the way that is chosen"
    );
}

#[derive(Clone, Debug)]
enum Step {
    Write(Range<u64>),
    Read(Range<u64>),
    Drop(Range<u64>),
}

fn step() -> impl Strategy<Value = Step> {
    let pages = (0..2 * PAGES, 1..40u64).prop_map(|(at, len)| at..(at + len).min(2 * PAGES));
    (0..3, pages).prop_map(|(kind, pages)| match kind {
        0 => Step::Write(pages),
        1 => Step::Read(pages),
        _ => Step::Drop(pages),
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn own_pages_are_those_written_and_not_dropped_since(
        steps in prop::collection::vec(step(), 0..60),
    ) {
        let ram = ram();
        let mut own = BTreeSet::new();
        for step in steps {
            match step {
                Step::Write(pages) => for page in pages {
                    write(&ram, page);
                    own.insert(page);
                },
                Step::Read(pages) => for page in pages {
                    read(&ram, page);
                },
                Step::Drop(pages) => for page in pages {
                    drop_page(&ram, page);
                    own.remove(&page);
                },
            }
        }
        assert_own(&ram, &own);
    }
}

#[test]
fn many_scattered_pages_are_all_found() {
    // 40,000 ranges: 20 batches of PAGEMAP_SCAN, each of several buffers of the kernel's.
    let ram = private(MemoryLayout::new(512).unwrap());
    let own: BTreeSet<u64> = (0..40_000).map(|index| 3 * index + index % 2).collect();
    own.iter().for_each(|&page| write(&ram, page));
    assert_own(&ram, &own);
}

#[test]
fn a_full_last_batch_ends_the_search() {
    // Exactly as many ranges as two calls return.
    let ram = private(MemoryLayout::new(64).unwrap());
    let own: BTreeSet<u64> = (0..4096).map(|index| 2 * index).collect();
    own.iter().for_each(|&page| write(&ram, page));
    assert_own(&ram, &own);
}

#[test]
fn all_pages_written_are_one_range() {
    let ram = ram();
    (0..2 * PAGES).for_each(|page| write(&ram, page));
    assert_eq!(ram.own_pages().unwrap(), from_ref(&(0..2 * PAGES * PAGE)));
    assert_own(&ram, &(0..2 * PAGES).collect());
}

#[test]
fn a_zero_page_that_a_fault_was_answered_with_is_not_an_own_page() {
    let ram = ram();
    write(&ram, 11);
    Userfault::on(host(&ram, 13), 1).put_zero_page(host(&ram, 13));
    assert_eq!(read(&ram, 13), 0);
    let zero_page = entries::zero_page(&File::open(PAGEMAP).unwrap());
    match zero_page {
        Some(_) => assert_own(&ram, &BTreeSet::from([11])),
        // A process that sees no frames: as the documentation says.
        None => assert_eq!(
            by_entries(&ram),
            [11, 13].map(|page| page * PAGE..(page + 1) * PAGE)
        ),
    }
}

#[test]
fn a_protected_page_counts_until_it_is_unprotected_and_dropped() {
    // A kernel's way: the protection of a page that is dropped stays behind as a marker, and that
    // looks like a page in swap.
    let ram = ram();
    write(&ram, 11);
    let userfault = Userfault::on(host(&ram, 0), PAGES);
    userfault.protect(host(&ram, 11), true);
    assert_own(&ram, &BTreeSet::from([11]));
    drop_page(&ram, 11);
    assert_own(&ram, &BTreeSet::from([11]));
    userfault.protect(host(&ram, 11), false);
    assert_own(&ram, &BTreeSet::new());
}

/// A userfaultfd(2) for missing and for protected pages, of faults in user mode: such a one needs no
/// privilege.
struct Userfault(OwnedFd);

impl Userfault {
    fn on(start: *mut u8, pages: u64) -> Userfault {
        const USER_MODE_ONLY: libc::c_int = 1;
        // PAGEFAULT_FLAG_WP and WP_HUGETLBFS_SHMEM (Linux 5.19).
        const FEATURES: u64 = 1 | 1 << 12;
        const MISSING_AND_WP: u64 = 3;
        let flags = libc::O_CLOEXEC | USER_MODE_ONLY;
        // SAFETY: no memory is passed.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        assert!(fd >= 0, "userfaultfd: {}", io::Error::last_os_error());
        // SAFETY: a fresh descriptor that nobody else owns.
        let new = Userfault(unsafe { OwnedFd::from_raw_fd(fd as i32) });
        new.call(0xc018_aa3f, &mut [0xaa, FEATURES, 0]); // UFFDIO_API
        let len = pages * PAGE;
        new.call(0xc020_aa00, &mut [start as u64, len, MISSING_AND_WP, 0]); // UFFDIO_REGISTER
        new
    }

    fn protect(&self, page: *mut u8, on: bool) {
        self.call(0xc018_aa06, &mut [page as u64, PAGE, u64::from(on)]); // UFFDIO_WRITEPROTECT
    }

    fn put_zero_page(&self, page: *mut u8) {
        self.call(0xc020_aa04, &mut [page as u64, PAGE, 0, 0]); // UFFDIO_ZEROPAGE
    }

    fn call(&self, request: libc::c_ulong, argument: &mut [u64]) {
        // SAFETY: the arguments are as long as the request says in its bits 16 to 29.
        let done = unsafe { libc::ioctl(self.0.as_raw_fd(), request, argument.as_mut_ptr()) };
        assert_eq!(done, 0, "{request:#x}: {}", io::Error::last_os_error());
    }
}
