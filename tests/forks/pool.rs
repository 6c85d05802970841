//! Clones of shells that were built ahead: the same machines, sooner.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use forkvm::abi::doorbell::report;
use forkvm::engine::Member;
use forkvm::{CloneSpec, End, ForkPoint, FreezeKind, MemoryMode};

use crate::common::{
    Guest, LONG, Setup, expect_end, expect_oracle_ok, finish_oracle, fork_by, full_scale, need_kvm,
};

/// Waits until `count` shells are ready.
fn wait_for_shells(vm: &Guest, count: usize) {
    let start = Instant::now();
    while vm.family().pool().waiting() != count {
        assert!(start.elapsed() < LONG, "{}", vm.family().pool().waiting());
        thread::sleep(Duration::from_millis(1));
    }
}

fn clone_of(point: &Arc<ForkPoint>) -> Arc<Member> {
    point.spawn(1).unwrap().remove(0)
}

/// The second fork takes shells that were primed with the state of the first one, when every register
/// held something else.
#[test]
fn a_shell_that_was_built_for_one_fork_serves_the_next_one() {
    need_kvm!();
    for vcpus in [1, 2] {
        let vm = Setup::new("job=oracle mib=1 writers=1")
            .vcpus(vcpus)
            .pool(2)
            .here()
            .boot();
        vm.wait_ready(LONG).unwrap();
        for (forks, mode) in [
            (1, MemoryMode::Cow),
            (2, MemoryMode::Cow),
            (3, MemoryMode::Lazy),
        ] {
            let clones = vm.fork(fork_by(FreezeKind::Auto, mode, 2)).unwrap();
            expect_oracle_ok(&vm, vm.member(), forks);
            for clone in &clones {
                expect_end(&vm, clone.member(), End::Exited(0));
            }
            wait_for_shells(&vm, 2);
        }
        finish_oracle(&vm, vm.member());
    }
}

#[test]
fn every_register_survives_a_fork_into_shells_of_the_pool() {
    need_kvm!();
    let vm = Setup::new("job=registers n=2 seed=11")
        .vcpus(2)
        .pool(2)
        .here()
        .boot();
    expect_end(&vm, vm.member(), End::Exited(0));
    wait_for_shells(&vm, 2);
    assert_eq!(vm.consoles.text().matches("registers ok").count(), 3);
    // The parent has ended; its clones are the fork point's, and each knows what it must find.
    let clones = vm.log.clones();
    assert_eq!(clones.len(), 2);
}

#[test]
fn what_was_taken_from_the_pool_is_built_anew() {
    need_kvm!();
    let vm = Setup::new("job=touch mib=1 idle=1").pool(3).here().boot();
    vm.wait_ready(LONG).unwrap();
    assert_eq!(vm.family().pool().waiting(), 0, "no shape is known yet");
    let point = vm.fork_point(CloneSpec::new(1)).unwrap();
    for count in [5, 2] {
        for clone in point.spawn(count).unwrap() {
            clone.wait_report(report::ACTION, 1, LONG).unwrap();
        }
        wait_for_shells(&vm, 3);
    }
}

#[test]
fn a_clone_of_a_pool_comes_sooner_than_one_that_is_built() {
    need_kvm!();
    // Here, and with no other pool: workers take turns, and the one that is asked may have a shell left.
    let setup = Setup::new("job=touch mib=4 idle=1").here().pool(0);
    let vm = setup.memory_mib(512).boot();
    vm.wait_ready(LONG).unwrap();
    let point = vm.fork_point(CloneSpec::new(1)).unwrap();
    let restored = |clone: Arc<Member>| {
        let times = clone.timeline();
        clone.kill();
        times.restored.unwrap() - times.spawn_requested.unwrap()
    };
    let (mut pooled, mut built) = (Vec::new(), Vec::new());
    for _ in 0..20 {
        built.push(restored(clone_of(&point)));
        point.fill_pool(1).unwrap();
        pooled.push(restored(clone_of(&point)));
    }
    pooled.sort_unstable();
    built.sort_unstable();
    println!(
        "restored, p50: {:?} pooled, {:?} built",
        pooled[10], built[10]
    );
    if full_scale() {
        assert!(pooled[10] * 2 < built[10], "{pooled:?} {built:?}");
    }
}
