//! What a lazy clone fetches is what it touches, in chunks, and no more.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use forkvm::abi::doorbell::report;
use forkvm::engine::{ForkError, MemberError, Phase};
use forkvm::vmm::{PausedVm, memory};
use forkvm::{Error, FaultConfig, ForkPoint, FreezeKind, MemoryMode};
use vm_memory::{Bytes, GuestAddress};

use crate::common::switch::{Manner, Switch};
use crate::common::{Guest, LONG, Setup, fork_by, need_kvm, scaled};

const PAGE: u64 = 4096;

/// Chunks that a clone may need for its own code, stacks and page tables, beside those that its
/// registers name and that are there before it runs.
const OF_THE_CLONE: u64 = 8;

/// A parent whose clones reach for its memory as `how` says, and a lazy fork point of it that nothing completes.
fn reached_point(how: &str) -> (Guest, Arc<ForkPoint>) {
    let vm = Setup::new(format!("job=reach mib={} {how}", scaled(64, 8)))
        .memory_mib(128)
        .no_copier()
        .boot();
    vm.wait_ready(LONG).unwrap();
    let point = vm
        .fork_point(fork_by(FreezeKind::WriteProtect, MemoryMode::Lazy, 1))
        .unwrap();
    (vm, point)
}

/// A clone reads `touch` pages, each in a chunk of its own, while the parent rewrites one page of
/// its own without pause.
#[test]
fn a_clone_that_touches_k_scattered_pages_brings_at_most_k_chunks() {
    need_kvm!();
    let touch = u64::from(scaled(200, 20));
    let (vm, point) = reached_point(&format!("touch={touch} order=scattered hot=1"));
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

/// What the first clone has brought is in the image, which the next one maps.
#[test]
fn a_sibling_that_touches_what_the_first_clone_did_is_cheaper_than_that_one() {
    need_kvm!();
    let touch = u64::from(scaled(200, 20));
    let (vm, point) = reached_point(&format!("touch={touch} order=scattered"));
    let cost_of_one = || {
        let before = vm.family().faults().figures();
        let clone = point.spawn(1).unwrap().remove(0);
        clone.wait_report(report::ANSWER, 1, LONG).unwrap();
        vm.family().faults().figures().pages_by_fault - before.pages_by_fault
    };
    let (first, sibling) = (cost_of_one(), cost_of_one());
    println!("pages by fault: {first} of the first clone, {sibling} of its sibling");
    assert!(!point.image().is_whole());
    assert!(
        first >= touch,
        "{first} pages for {touch} that were touched"
    );
    assert!(sibling < first / 2, "{sibling} pages after {first}");
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

/// File offsets of the pages that the vCPUs name as they stand, and that of the doorbell page.
fn first_pages(paused: &PausedVm<'_>) -> BTreeSet<u64> {
    let guest = paused.ram().guest();
    let mut read = |address| guest.read_obj::<u64>(GuestAddress(address)).ok();
    let mut pages = paused.save().unwrap().named_pages(&mut read);
    pages.push(paused.doorbell().page().expect("the guest has one"));
    let offset = |page| paused.ram().layout().offset_of(page);
    pages.into_iter().filter_map(offset).collect()
}

fn lazy_point(vm: &Guest) -> Result<BTreeSet<u64>, Error> {
    let point = vm.fork_point(fork_by(FreezeKind::WriteProtect, MemoryMode::Lazy, 1))?;
    let data = memory::data_extents(point.image().file()).unwrap();
    Ok(data
        .into_iter()
        .flat_map(|run| run.step_by(PAGE as usize))
        .collect())
}

/// The fork waits for each of them: where one cannot be had, it fails.
#[test]
fn the_pages_that_vcpus_name_and_the_doorbell_page_are_there_before_a_clone_is_spawned() {
    need_kvm!();
    let switch = Switch::new();
    // Found in the pause of each fork, which cannot have the one with the number `fails`.
    let found = Arc::new(Mutex::new(BTreeSet::new()));
    let fails = Arc::new(AtomicUsize::new(0));
    let (found_in_pause, number, pages) = (found.clone(), fails.clone(), switch.clone());
    let vm = Setup::new("job=touch mib=8 idle=1")
        .vcpus(2)
        .faults(FaultConfig {
            chunk: PAGE,
            background: None,
            ..FaultConfig::default()
        })
        .sources(switch)
        .hook(move |phase, paused| {
            if let (Phase::Freeze, Some(paused)) = (phase, paused) {
                let first = first_pages(paused);
                match first.iter().nth(number.load(Ordering::SeqCst)) {
                    Some(page) => pages.set(*page..page + PAGE, Manner::Fail),
                    None => pages.set_all(Manner::Near),
                }
                *found_in_pause.lock().unwrap() = first;
            }
            Ok(())
        })
        .here()
        .boot();
    vm.wait_ready(LONG).unwrap();
    let there = loop {
        let asked = fails.load(Ordering::SeqCst);
        let forked = lazy_point(&vm);
        let first = found.lock().unwrap().clone();
        if asked >= first.len() {
            break forked.unwrap();
        }
        let Err(Error::Member(MemberError::Fork(ForkError::Source(why)))) = forked else {
            panic!("without number {asked} of {first:x?}: {forked:x?}");
        };
        assert!(why.to_string().contains("as the test says"), "{why}");
        fails.fetch_add(1, Ordering::SeqCst);
    };
    let first = found.lock().unwrap().clone();
    // Four levels of page tables, code and stack at least, and the doorbell page.
    assert!(first.len() > 6, "{first:x?}");
    assert!(
        there.is_superset(&first),
        "{there:x?} lacks some of {first:x?}"
    );
    assert!(there.len() < 8 * 256 / 8, "{} pages", there.len());
}
