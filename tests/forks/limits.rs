//! More clones than the host has room for: asked n, told m. Nothing is lost by having asked.

use std::ops::RangeBounds;

use forkvm::abi::doorbell::report;
use forkvm::abi::errno;
use forkvm::engine::limits::{Limit, LimitError, available_kib};
use forkvm::engine::{ForkError, MemberError};
use forkvm::{CloneSpec, End, Error};

use crate::common::{
    Guest, LONG, Setup, TestGroup, expect_end, expect_oracle_ok, finish_oracle, is_part,
    leave_mappings, need_kvm, run_part, scaled,
};

/// Exit status of a guest whose fork was refused (guest-images/bare/README.md).
const REFUSED: u32 = 3;

/// As much as leaves room for 2 to 3 clones on this host.
fn a_third_of_memory() -> u64 {
    available_kib().unwrap() / 1024 / 3 - 100
}

#[test]
fn a_host_that_asks_for_too_many_is_told_how_many_would_do() {
    need_kvm!();
    let vm = Setup::new("job=oracle mib=1").boot();
    vm.wait_ready(LONG).unwrap();
    let spec = CloneSpec {
        expected_write_mib: a_third_of_memory(),
        ..CloneSpec::new(1000)
    };
    let error = vm.fork(spec).err().unwrap();
    let Error::Member(MemberError::Fork(fork_error)) = &error else {
        panic!("{error:?}")
    };
    let ForkError::Limits(LimitError::TooMany {
        asked: 1000,
        room,
        limit,
    }) = *fork_error
    else {
        panic!("{fork_error:?}");
    };
    assert!(limit.is_memory(), "{limit:?}");
    assert!((1..=4).contains(&room), "{room}");
    let text = fork_error.to_string();
    assert!(
        text.contains("1000 clones") && text.contains(&format!("room for {room}")),
        "{text}"
    );

    let clones = vm.fork(CloneSpec::new(1)).unwrap();
    expect_end(&vm, clones[0].member(), End::Exited(0));
    expect_oracle_ok(&vm, vm.member(), 1);
    finish_oracle(&vm, vm.member());
}

#[test]
fn zero_clones_are_refused_by_name() {
    need_kvm!();
    let vm = Setup::new("job=spin").boot();
    vm.wait_ready(LONG).unwrap();
    let error = vm.fork(CloneSpec::new(0)).err().unwrap();
    assert!(
        matches!(
            error,
            Error::Member(MemberError::Fork(ForkError::Limits(LimitError::NoClones)))
        ),
        "{error:?}"
    );
}

#[test]
fn a_guest_that_asks_for_too_many_is_granted_fewer_and_all_of_them_know() {
    need_kvm!();
    let forks = CloneSpec {
        expected_write_mib: a_third_of_memory(),
        ..CloneSpec::default()
    };
    let vm = Setup::new("job=fork n=1000").guest_forks(forks).boot();
    let granted = vm.join();
    let clones = vm.log.clones();
    let text = vm.consoles.text();
    let m = clones.len() as u32;
    assert!((1..=4).contains(&m), "{m} clones\n{text}");
    assert_eq!(granted.end, End::Exited(m), "{text}");
    assert!(text.contains(&format!("vm: parent of {m}\n")), "{text}");
    for (id, clone) in (1..).zip(&clones) {
        expect_end(&vm, clone, End::Exited(id));
        let line = format!("{}: clone {id} of {m}\n", clone.name());
        assert!(vm.consoles.text().contains(&line), "{text}");
    }
}

#[test]
fn a_guest_for_whose_fork_there_is_no_memory_gets_enomem_and_runs_on() {
    need_kvm!();
    let forks = CloneSpec {
        expected_write_mib: 1 << 30,
        ..CloneSpec::default()
    };
    let vm = Setup::new("job=fork n=1 mib=2 tries=3")
        .guest_forks(forks)
        .boot();
    // It has verified its memory when it reports a refusal, and then asks again.
    let refusal = report::USER + errno::ENOMEM as u32;
    vm.member().wait_report(refusal, 2, LONG).unwrap();
    expect_end(&vm, vm.member(), End::Exited(REFUSED));
    let text = vm.consoles.text();
    assert!(
        text.contains(&format!("fork failed with error -{}", errno::ENOMEM)),
        "{text}"
    );
    assert!(vm.log.clones().is_empty());
}

/// Has a guest fork until it is granted fewer than it asks for, and then the host ask for 200: that is
/// refused by `limit`, and what it names as possible is possible.
fn expect_bounded_by(limit: Limit, granted: impl RangeBounds<u32>) {
    let vm = Setup::new("job=fork n=200").here().pool(0).boot();
    let end = vm.join().end;
    let m = vm.log.clones().len() as u32;
    assert_eq!(end, End::Exited(m), "{}", vm.consoles.text());
    assert!(granted.contains(&m), "{m} clones");
    vm.log.clones().iter().for_each(|clone| drop(clone.wait()));

    let vm = Setup::new("job=touch mib=1 idle=1").here().pool(0).boot();
    vm.wait_ready(LONG).unwrap();
    let (error, room) = refused(&vm, 200, limit);
    let text = error.to_string();
    assert!(text.contains(limit.mend()), "{text}");
    let clones = vm.fork(CloneSpec::new(room)).unwrap();
    for clone in &clones {
        clone.member().wait_report(report::ACTION, 1, LONG).unwrap();
    }
}

/// A fork into `asked` that is refused by `limit`, and how many it says would do.
fn refused(vm: &Guest, asked: u32, limit: Limit) -> (ForkError, u32) {
    let error = vm.fork(CloneSpec::new(asked)).err().unwrap();
    let Error::Member(MemberError::Fork(error)) = error else {
        panic!("{error:?}")
    };
    let ForkError::Limits(LimitError::TooMany {
        room: room @ 1..,
        limit: named,
        ..
    }) = error
    else {
        panic!("{error:?}");
    };
    assert_eq!(named, limit, "{error}");
    (error, room)
}

#[test]
fn few_file_descriptors_bound_the_clones_and_are_named() {
    need_kvm!();
    // Soft and hard limit: the soft one alone is raised.
    run_part("limits::in_a_process_with_few_descriptors", "ulimit -n 80");
}

#[test]
#[ignore = "few_file_descriptors_bound_the_clones_and_are_named runs it in a process of its own"]
fn in_a_process_with_few_descriptors() {
    if is_part("limits::in_a_process_with_few_descriptors") {
        expect_bounded_by(Limit::Descriptors, 1..40);
    }
}

#[test]
fn few_mappings_bound_the_clones_and_are_named() {
    need_kvm!();
    run_part("limits::in_a_process_with_few_mappings", "true");
}

#[test]
#[ignore = "few_mappings_bound_the_clones_and_are_named runs it in a process of its own"]
fn in_a_process_with_few_mappings() {
    if is_part("limits::in_a_process_with_few_mappings") {
        leave_mappings(scaled(1000, 600) as usize);
        expect_bounded_by(Limit::Mappings, 1..120);
    }
}

#[test]
fn threads_of_the_cgroup_bound_the_clones_and_are_named() {
    need_kvm!();
    let Some(group) = TestGroup::new("pids") else {
        return;
    };
    group.set("pids.max", "100");
    run_part("limits::in_a_cgroup_with_few_threads", &group.enter());
}

#[test]
#[ignore = "threads_of_the_cgroup_bound_the_clones_and_are_named runs it in a cgroup of its own"]
fn in_a_cgroup_with_few_threads() {
    if is_part("limits::in_a_cgroup_with_few_threads") {
        expect_bounded_by(Limit::ThreadsOfCgroup, 1..34);
    }
}

#[test]
fn memory_of_the_cgroup_bounds_the_clones_and_is_named_before_anything_is_killed() {
    need_kvm!();
    let Some(group) = TestGroup::new("memory") else {
        return;
    };
    group.set(group.memory_limit(), &(256 << 20).to_string());
    run_part("limits::in_a_cgroup_with_little_memory", &group.enter());
}

#[test]
#[ignore = "memory_of_the_cgroup_bounds_the_clones_… runs it in a cgroup of its own"]
fn in_a_cgroup_with_little_memory() {
    if is_part("limits::in_a_cgroup_with_little_memory") {
        expect_bounded_by(Limit::MemoryOfCgroup, 1..50);
    }
}
