//! Forks of a guest that is still populating its memory: what came in after the preparation of the
//! freeze and before the pause is data like the rest.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use forkvm::abi::doorbell::report;
use forkvm::engine::{Member, Phase};
use forkvm::{FreezeKind, MemoryMode};

use crate::common::{Guest, LONG, Setup, fork_by, need_kvm, scaled};

/// Bytes of the memory of `member` that are populated.
fn populated(member: &Member) -> u64 {
    let ranges = member.with_paused(|paused| paused.ram().populated().unwrap());
    let ranges = ranges.unwrap().into_iter();
    ranges.map(|range| range.end - range.start).sum()
}

/// A page that was missed would be zero in the clones, and the guest would not find its pattern.
fn expect_whole(vm: &Guest, member: &Arc<Member>, freeze: FreezeKind) {
    let ready = member.wait_report(report::READY, 1, LONG);
    ready.unwrap_or_else(|error| panic!("{error}\n{}", vm.consoles.text()));
    let clone = member
        .fork(fork_by(freeze, MemoryMode::Lazy, 1))
        .unwrap()
        .clones
        .remove(0);
    let answer = clone.wait_report(report::ANSWER, 1, LONG);
    answer.unwrap_or_else(|error| panic!("{error}\n{}", vm.consoles.text()));
    assert_eq!(vm.consoles.text(), "");
}

#[test]
fn pages_that_a_parent_and_its_clone_populate_as_they_are_forked_are_in_their_clones() {
    need_kvm!();
    let mib = u64::from(scaled(64, 8));
    let vm = Setup::new(format!("job=reach mib={mib} touch={}", mib * 256))
        .memory_mib(128)
        .no_copier()
        .here()
        .hook(|phase, _| {
            if phase == Phase::Pause {
                // The freeze is prepared, and the guest is not paused yet.
                thread::sleep(Duration::from_millis(5));
            }
            Ok(())
        })
        .boot();
    let start = Instant::now();
    while populated(vm.member()) < mib << 17 {
        assert!(start.elapsed() < LONG, "{}", vm.consoles.text());
    }
    let before = populated(vm.member());
    let forked = vm
        .member()
        .fork(fork_by(FreezeKind::WriteProtect, MemoryMode::Lazy, 1))
        .unwrap();
    let (clone, at_the_fork) = (&forked.clones[0], forked.point.populated());
    let of_clone = clone
        .fork(fork_by(FreezeKind::Delta, MemoryMode::Lazy, 1))
        .unwrap();
    println!(
        "{before} bytes before the fork, {at_the_fork} in it, {} in that of the clone",
        of_clone.point.populated()
    );
    assert!(before < at_the_fork && at_the_fork < mib << 20);
    assert!(at_the_fork < of_clone.point.populated() && of_clone.point.populated() < mib << 20);

    expect_whole(&vm, vm.member(), FreezeKind::WriteProtect);
    expect_whole(&vm, clone, FreezeKind::Delta);
    expect_whole(&vm, &of_clone.clones[0], FreezeKind::Delta);
}
