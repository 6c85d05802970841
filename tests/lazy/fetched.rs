//! What a lazy clone fetches is what it touches, in chunks, and no more.

use forkvm::abi::doorbell::report;
use forkvm::{FaultConfig, FreezeKind, MemoryMode};

use crate::common::{LONG, Setup, fork_by, need_kvm, scaled};

/// Chunks that a clone may need for its own code, stacks and page tables, beside those that its
/// registers name and that are there before it runs.
const OF_THE_CLONE: u64 = 8;

/// A clone reads `touch` pages, each in a chunk of its own, while the parent rewrites one page of
/// its own without pause.
#[test]
fn a_clone_that_touches_k_scattered_pages_brings_at_most_k_chunks() {
    need_kvm!();
    let touch = u64::from(scaled(200, 20));
    let vm = Setup::new(format!(
        "job=reach mib={} touch={touch} order=scattered hot=1",
        scaled(64, 8)
    ))
    .memory_mib(128)
    .no_copier()
    .boot();
    vm.wait_ready(LONG).unwrap();
    let point = vm
        .fork_point(fork_by(FreezeKind::WriteProtect, MemoryMode::Lazy, 1))
        .unwrap();
    // The parent has written what it writes, all of which the image has by now.
    vm.member().with_paused(|_paused| ()).unwrap();
    let (first, before) = (
        point.image().pages_present(),
        vm.family().faults().figures(),
    );
    let clone = point.spawn(1).unwrap().remove(0);
    clone.wait_report(report::ANSWER, 1, LONG).unwrap();

    let (present, after) = (
        point.image().pages_present(),
        vm.family().faults().figures(),
    );
    let chunk = FaultConfig::default().chunk / 4096;
    println!("{first} pages at first, {present} after {touch} touches; {after:?}");
    let by_fault = after.pages_by_fault - before.pages_by_fault;
    assert!(by_fault <= (touch + OF_THE_CLONE) * chunk, "{by_fault}");
    assert!(by_fault >= (touch - OF_THE_CLONE) * chunk, "{by_fault}");
    assert_eq!(after.pages_by_background, 0);
    assert_eq!(after.pages_by_prefetch, before.pages_by_prefetch);
    let by_parent = after.pages_by_parent_write - before.pages_by_parent_write;
    assert_eq!(
        present - first,
        by_fault + by_parent,
        "each page has a cause"
    );
    assert!(by_parent <= OF_THE_CLONE * chunk, "{by_parent}");
    assert!(!point.image().is_whole());
    assert_eq!(vm.consoles.text(), "");
}

/// Memory is at hand, so what comes ahead is there before the clone misses it.
#[test]
fn a_clone_that_touches_its_memory_in_order_waits_for_few_of_its_chunks() {
    need_kvm!();
    let touch = u64::from(scaled(4096, 512));
    let vm = Setup::new(format!("job=reach mib={} touch={touch}", scaled(64, 8)))
        .memory_mib(128)
        .no_copier()
        .here()
        .boot();
    vm.wait_ready(LONG).unwrap();
    let point = vm
        .fork_point(fork_by(FreezeKind::WriteProtect, MemoryMode::Lazy, 1))
        .unwrap();
    let (first, before) = (
        point.image().pages_present(),
        vm.family().faults().figures(),
    );
    let clone = point.spawn(1).unwrap().remove(0);
    clone.wait_report(report::ANSWER, 1, LONG).unwrap();

    let (present, after) = (
        point.image().pages_present(),
        vm.family().faults().figures(),
    );
    println!("{first} pages at first, {present} after {touch} touches; {after:?}");
    let config = FaultConfig::default();
    let by_fault = after.pages_by_fault - before.pages_by_fault;
    let ahead = after.pages_by_prefetch - before.pages_by_prefetch;
    assert!(by_fault <= touch / 2, "{by_fault} pages were waited for");
    assert!(ahead >= touch / 2, "{ahead} pages came ahead");
    let most = touch + (config.readahead + OF_THE_CLONE * config.chunk) / 4096;
    assert!(present - first <= most, "more came than a window ahead");
    assert_eq!(after.pages_by_background, 0);
    assert_eq!(vm.consoles.text(), "");
}

/// What was never written is no page of an image, and costs a clone no page of its own.
#[test]
fn a_clone_that_touches_what_its_parent_never_did_brings_nothing() {
    need_kvm!();
    let pages = 512;
    let vm = Setup::new(format!("job=obey pages={pages}"))
        .no_copier()
        .here()
        .boot();
    vm.wait_ready(LONG).unwrap();
    let point = vm
        .fork_point(fork_by(FreezeKind::WriteProtect, MemoryMode::Lazy, 1))
        .unwrap();
    let clone = point.spawn(1).unwrap().remove(0);
    let said = crate::common::Obedient::new(&vm, &clone).say(&format!("r 0 {pages}"));
    assert!(
        (0..)
            .zip(&said)
            .all(|(page, line)| *line == format!("= {page} 0"))
    );
    let figures = vm.family().faults().figures();
    println!("{figures:?}");
    assert!(figures.zero_faults > 0);
    let present = point.image().pages_present();
    assert!(present * 4096 <= point.populated(), "{present} pages");
    assert!(present < pages / 2, "{present} pages");
}
