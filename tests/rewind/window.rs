//! A guest that has changed its page tables since the fork sees its old world after a rewind.

use std::time::Instant;

use forkvm::abi::doorbell::report;
use forkvm::{CloneVm, FreezeKind, MemoryMode, RewindWay};

use crate::common::{Guest, LONG, Setup, fork_by, need_kvm, scaled};
use crate::{two_dimensional, ways};

fn clone_of(vm: &Guest, mode: MemoryMode) -> CloneVm {
    let freeze = match mode {
        MemoryMode::Cow => FreezeKind::Auto,
        MemoryMode::Lazy => FreezeKind::WriteProtect,
    };
    vm.fork(fork_by(freeze, mode, 1)).unwrap().remove(0)
}

/// It has found all as it was at the fork, and has changed it.
fn expect_old_world(vm: &Guest, clone: &CloneVm) {
    if let Err(error) = clone.member().wait_report(report::ANSWER, 1, LONG) {
        panic!("{error}\n{}", vm.consoles.text());
    }
}

fn rewinds(mode: MemoryMode, times: u32) {
    for way in ways() {
        let vm = Setup::new("job=window mib=1").no_copier().boot();
        vm.wait_ready(LONG).unwrap();
        let clone = clone_of(&vm, mode);
        expect_old_world(&vm, &clone);
        for _ in 0..times {
            assert_eq!(clone.rewind_by(way).unwrap(), way);
            expect_old_world(&vm, &clone);
        }
    }
}

#[test]
fn page_tables_go_back_with_a_whole_image() {
    need_kvm!();
    rewinds(MemoryMode::Cow, scaled(30, 5));
}

#[test]
fn page_tables_go_back_with_an_image_that_fills() {
    need_kvm!();
    rewinds(MemoryMode::Lazy, scaled(30, 5));
}

#[test]
fn the_plain_way_is_refused_where_translations_would_survive_and_is_taken_where_not() {
    need_kvm!();
    let vm = Setup::new("job=window mib=1").boot();
    vm.wait_ready(LONG).unwrap();
    let clone = clone_of(&vm, MemoryMode::Cow);
    expect_old_world(&vm, &clone);
    if two_dimensional() {
        assert_eq!(clone.rewind().unwrap(), RewindWay::InPlace);
    } else {
        let reports = clone.member().reports();
        let refused = clone.rewind_by(RewindWay::InPlace).unwrap_err();
        let text = format!("{:#}", anyhow::Error::from(refused));
        assert!(text.contains("shadows page tables"), "{text}");
        assert_eq!(clone.member().reports(), reports, "nothing has changed");
        assert_eq!(clone.rewind().unwrap(), RewindWay::FreshShell);
    }
    expect_old_world(&vm, &clone);
}

#[test]
fn a_thousand_rewinds_find_every_page_and_every_translation_as_it_was() {
    need_kvm!();
    // Each page table entry that it writes is an exit on a shadow MMU: here the number of rewinds counts.
    let vm = Setup::new("job=window mib=1 shown=8").pool(1).boot();
    vm.wait_ready(LONG).unwrap();
    let clone = clone_of(&vm, MemoryMode::Cow);
    expect_old_world(&vm, &clone);
    let (start, times) = (Instant::now(), scaled(1000, 30));
    let mut ways = Vec::new();
    for _ in 0..times {
        ways.push(clone.rewind().unwrap());
        expect_old_world(&vm, &clone);
    }
    ways.dedup();
    println!("{times} rewinds by {ways:?} in {:?}", start.elapsed());
    assert_eq!(ways.len(), 1, "one host, one way");
}
