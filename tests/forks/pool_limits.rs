//! A pool that cannot grow says what is lacking and what to do about it, and has what there is room for.

use std::thread;
use std::time::{Duration, Instant};

use forkvm::CloneSpec;
use forkvm::abi::doorbell::report;
use forkvm::engine::PoolError;
use forkvm::engine::limits::{Limit, LimitError};
use forkvm::engine::spawn::SpawnError;

use crate::common::{
    Guest, LONG, Setup, TestGroup, is_part, leave_mappings, need_kvm, run_part, scaled,
};

/// More shells than any of these parts has room for.
const TOO_MANY: u32 = 2000;

fn boot(shells: u32) -> Guest {
    let vm = Setup::new("job=touch mib=1 idle=1")
        .here()
        .pool(shells)
        .boot();
    vm.wait_ready(LONG).unwrap();
    vm
}

/// Of clones that write next to nothing, as shells do.
fn idle(count: u32) -> CloneSpec {
    CloneSpec {
        expected_write_mib: 0,
        ..CloneSpec::new(count)
    }
}

/// Asks for too many shells, which `limit` refuses, and then for as many as it says there is room for.
fn expect_bounded_by(limit: Limit) {
    let vm = boot(0);
    let point = vm.fork_point(idle(1)).unwrap();
    let SpawnError::Shell(error) = point.fill_pool(TOO_MANY).unwrap_err() else {
        panic!("it is not for want of shells");
    };
    let PoolError::Limits(LimitError::TooMany {
        asked: TOO_MANY,
        room: room @ 2..TOO_MANY,
        limit: named,
    }) = error
    else {
        panic!("{error:?}");
    };
    let text = error.to_string();
    println!("{text}");
    assert_eq!(named, limit, "{text}");
    assert!(text.contains(limit.mend()), "{text}");
    assert_eq!(vm.family().pool().waiting(), 0, "none was built");

    // A clone takes some more mappings than its shell does, and so does the process meanwhile.
    let count = room / 2;
    assert_eq!(point.fill_pool(count).unwrap(), count);
    for clone in point.spawn(count).unwrap() {
        clone.wait_report(report::ACTION, 1, LONG).unwrap();
    }
}

#[test]
fn a_pool_without_file_descriptors_to_grow_names_them() {
    need_kvm!();
    run_part(
        "pool_limits::in_a_process_with_few_descriptors",
        "ulimit -n 80",
    );
}

#[test]
#[ignore = "a_pool_without_file_descriptors_to_grow_names_them runs it in a process of its own"]
fn in_a_process_with_few_descriptors() {
    if is_part("pool_limits::in_a_process_with_few_descriptors") {
        expect_bounded_by(Limit::Descriptors);
    }
}

#[test]
fn a_pool_without_mappings_to_grow_names_them() {
    need_kvm!();
    run_part("pool_limits::in_a_process_with_few_mappings", "true");
}

#[test]
#[ignore = "a_pool_without_mappings_to_grow_names_them runs it in a process of its own"]
fn in_a_process_with_few_mappings() {
    if is_part("pool_limits::in_a_process_with_few_mappings") {
        leave_mappings(scaled(1000, 600) as usize);
        expect_bounded_by(Limit::Mappings);
    }
}

#[test]
fn a_pool_without_threads_to_grow_names_the_cgroup_that_has_no_more() {
    need_kvm!();
    let Some(group) = TestGroup::new("pids") else {
        return;
    };
    group.set("pids.max", "100");
    run_part("pool_limits::in_a_cgroup_with_few_threads", &group.enter());
}

#[test]
#[ignore = "a_pool_without_threads_to_grow_… runs it in a cgroup of its own"]
fn in_a_cgroup_with_few_threads() {
    if is_part("pool_limits::in_a_cgroup_with_few_threads") {
        expect_bounded_by(Limit::ThreadsOfCgroup);
    }
}

#[test]
fn a_pool_without_memory_to_grow_names_the_cgroup_that_has_no_more() {
    need_kvm!();
    let Some(group) = TestGroup::new("memory") else {
        return;
    };
    group.set(group.memory_limit(), &(160 << 20).to_string());
    run_part(
        "pool_limits::in_a_cgroup_with_little_memory",
        &group.enter(),
    );
}

#[test]
#[ignore = "a_pool_without_memory_to_grow_… runs it in a cgroup of its own"]
fn in_a_cgroup_with_little_memory() {
    if is_part("pool_limits::in_a_cgroup_with_little_memory") {
        expect_bounded_by(Limit::MemoryOfCgroup);
    }
}

#[test]
fn a_pool_that_cannot_be_kept_full_keeps_what_there_is_room_for_and_clones_go_on() {
    need_kvm!();
    run_part(
        "pool_limits::with_a_pool_that_cannot_be_kept_full",
        "ulimit -n 80",
    );
}

#[test]
#[ignore = "a_pool_that_cannot_be_kept_full_… runs it in a process of its own"]
fn with_a_pool_that_cannot_be_kept_full() {
    if !is_part("pool_limits::with_a_pool_that_cannot_be_kept_full") {
        return;
    }
    let vm = boot(TOO_MANY);
    let point = vm.fork_point(idle(1)).unwrap();
    for _ in 0..3 {
        for clone in point.spawn(3).unwrap() {
            clone.wait_report(report::ACTION, 1, LONG).unwrap();
            clone.kill();
            clone.wait();
        }
        wait_until_it_grows_no_more(&vm);
    }
}

/// It has shells, and gets none any more.
fn wait_until_it_grows_no_more(vm: &Guest) {
    let waiting = || vm.family().pool().waiting();
    let (mut last, mut since) = (0, Instant::now());
    while last == 0 || since.elapsed() < Duration::from_secs(1) {
        let now = waiting();
        if now != last {
            (last, since) = (now, Instant::now());
        }
        assert!(since.elapsed() < LONG, "the pool has none");
        thread::sleep(Duration::from_millis(10));
    }
    println!("{last} shells");
    assert!(last < TOO_MANY as usize);
}
