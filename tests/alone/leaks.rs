//! Forks in a row, as a service does them for days: nothing accumulates.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use forkvm::abi::doorbell::report;
use forkvm::vmm::Kvm;
use forkvm::{CloneSpec, End, FreezeKind, MemoryMode, RewindWay};

use crate::alone;
use crate::census::{Census, expect_again, mapping_count, status_kib};
use crate::common::{LONG, Setup, expect_end, expect_oracle_ok, fork_by, need_kvm, scaled};

/// Forks until the allocator, the stacks of threads and the parent's own pages are where they stay.
const WARM_UP: u32 = 20;

/// Forks in a row, of one clone each, which has ended before the next one.
fn forks_in_a_row(times: u32) {
    need_kvm!();
    let _turn = alone();
    let folder = tempfile::tempdir().unwrap();
    let vm = Setup::new("job=oracle mib=1")
        .memory_mib(32)
        .unlogged()
        .boot();
    vm.wait_ready(LONG).unwrap();
    let take = || Census::take(folder.path());
    let mut forks = 0;
    let mut fork = |times: u32| {
        for _ in 0..times {
            forks += 1;
            let clones = vm.fork(CloneSpec::new(1)).unwrap();
            expect_end(&vm, clones[0].member(), End::Exited(0));
            expect_oracle_ok(&vm, vm.member(), forks);
        }
    };
    fork(WARM_UP);
    // The test itself keeps two lines of console and a report of each fork.
    let kept = 1024 + u64::from(times) / 2;
    expect_level(take, &format!("{times} forks"), kept, || fork(times));
}

/// Each clone is killed: before its first instruction, while it fetches what it verifies, or after
/// its end.
fn lazy_forks(freeze: FreezeKind, times: u32) {
    need_kvm!();
    let _turn = alone();
    let folder = tempfile::tempdir().unwrap();
    let vm = Setup::new("job=oracle mib=1")
        .memory_mib(32)
        .no_copier()
        .unlogged()
        .boot();
    vm.wait_ready(LONG).unwrap();
    let mut forks = 0;
    if freeze == FreezeKind::Delta {
        forks += 1;
        let remap = fork_by(FreezeKind::Remap, MemoryMode::Cow, 1);
        drop(vm.fork_point(remap).unwrap());
        expect_oracle_ok(&vm, vm.member(), forks);
    }
    let take = || Census::take(folder.path());
    let mut fork = |times: u32| {
        for round in 0..times {
            forks += 1;
            let clones = vm.fork(fork_by(freeze, MemoryMode::Lazy, 2)).unwrap();
            thread::sleep(Duration::from_micros(u64::from(round % 20) * 100));
            for clone in &clones {
                clone.kill();
                let end = clone.join().end;
                // It may have been faster.
                assert!(matches!(end, End::Killed | End::Exited(0)), "{end:?}");
            }
            expect_oracle_ok(&vm, vm.member(), forks);
        }
    };
    fork(WARM_UP);
    // The test itself keeps lines of console and a report of each fork.
    let kept = 1024 + u64::from(times) / 2;
    expect_level(take, &format!("{times} forks"), kept, || fork(times));
}

#[test]
fn two_hundred_rewinds_by_each_way_leak_nothing() {
    need_kvm!();
    let _turn = alone();
    let in_place = Arc::new(Kvm::open().unwrap())
        .sees_rewritten_tables()
        .unwrap();
    let mut ways = vec![RewindWay::FreshShell, RewindWay::SlotReadd];
    ways.extend(in_place.then_some(RewindWay::InPlace));
    let folder = tempfile::tempdir().unwrap();
    let vm = Setup::new("job=window mib=1")
        .memory_mib(32)
        .unlogged()
        .boot();
    vm.wait_ready(LONG).unwrap();
    let clone = vm.fork(CloneSpec::new(1)).unwrap().remove(0);
    let take = || Census::take(folder.path());
    for way in ways {
        let rewind = |times: u32| {
            for _ in 0..times {
                clone.rewind_by(way).unwrap();
                clone.member().wait_report(report::ANSWER, 1, LONG).unwrap();
            }
        };
        rewind(WARM_UP);
        let times = scaled(200, 10);
        expect_level(take, &format!("{times} rewinds by {way}"), 1024, || {
            rewind(times)
        });
    }
}

/// `run` leaves what `take` sees as it was, and memory too, but for `kept_kib` that the test itself
/// keeps. What leaks grows each time; an allocator that takes an arena for one more thread than ever
/// before grows once, whenever that happens. So `run` has a few tries to show that it
/// can leave all as it was.
fn expect_level(take: impl Fn() -> Census, what: &str, kept_kib: u64, mut run: impl FnMut()) {
    const GROWTHS: u32 = 2;
    for growths in 0.. {
        let census = settled_census(&take);
        let (mappings, rss) = (mapping_count(), status_kib("VmRSS"));
        run();

        expect_again(&census, &take, &format!("after {what}"));
        let (more_mappings, more_rss) = (
            mapping_count().saturating_sub(mappings),
            status_kib("VmRSS").saturating_sub(rss),
        );
        let more = format!("{what}: {more_mappings} mappings more, {more_rss} KiB resident more");
        println!("{more}");
        if more_mappings <= 8 && more_rss <= kept_kib {
            break;
        }
        assert!(growths < GROWTHS, "{more}, as before");
    }
}

/// What there is once what a fork leaves to other threads is done.
fn settled_census(take: impl Fn() -> Census) -> Census {
    loop {
        let census = take();
        thread::sleep(Duration::from_millis(200));
        if take() == census {
            return census;
        }
    }
}

#[test]
fn a_thousand_forks_in_a_row_leak_nothing() {
    forks_in_a_row(scaled(1000, 20));
}

#[test]
#[ignore = "long"]
fn ten_thousand_forks_in_a_row_leak_nothing() {
    forks_in_a_row(10_000);
}

#[test]
fn two_hundred_lazy_forks_by_write_protect_leak_nothing() {
    lazy_forks(FreezeKind::WriteProtect, scaled(200, 10));
}

#[test]
fn two_hundred_lazy_forks_by_delta_leak_nothing() {
    lazy_forks(FreezeKind::Delta, scaled(200, 10));
}

#[test]
#[ignore = "long"]
fn ten_thousand_lazy_forks_by_write_protect_leak_nothing() {
    lazy_forks(FreezeKind::WriteProtect, 10_000);
}

#[test]
#[ignore = "long"]
fn ten_thousand_lazy_forks_by_delta_leak_nothing() {
    lazy_forks(FreezeKind::Delta, 10_000);
}
