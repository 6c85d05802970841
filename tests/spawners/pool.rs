//! Shells that wait in workers: who builds them, and how they count.

use forkvm::CloneSpec;
use forkvm::abi::doorbell::report;
use forkvm::engine::PoolError;
use forkvm::engine::limits::{Limit, LimitError};
use forkvm::engine::spawn::{SpawnError, Spawner};

use crate::common::{LONG, Setup, TestGroup, is_part, need_kvm, run_part, workers};
use crate::crashes::machines;
use crate::spread::wait_until;

#[test]
fn a_worker_builds_anew_what_was_taken_of_its_share_of_the_pool() {
    need_kvm!();
    let process = workers();
    let vm = Setup::new("job=touch mib=1 idle=1")
        .spawner(process.clone())
        .pool(4)
        .boot();
    vm.wait_ready(LONG).unwrap();
    let each_has = |count: usize| {
        for worker in process.processes() {
            wait_until("each worker has so many machines", || {
                machines(worker) == count
            });
        }
    };
    let point = vm.fork_point(CloneSpec::new(1)).unwrap();
    each_has(0);
    for _ in 0..2 {
        let clones = point.spawn(6).unwrap();
        for clone in &clones {
            clone.wait_report(report::ACTION, 1, LONG).unwrap();
        }
        each_has(3 + 2);
        for clone in &clones {
            clone.kill();
            clone.wait();
        }
        each_has(2);
    }
}

#[test]
fn what_shells_in_workers_have_taken_is_not_asked_for_once_more() {
    need_kvm!();
    let Some(group) = TestGroup::new("pids") else {
        return;
    };
    group.set("pids.max", "200");
    run_part("pool::in_a_cgroup_with_few_threads", &group.enter());
}

#[test]
#[ignore = "what_shells_in_workers_have_taken_… runs it in a cgroup of its own"]
fn in_a_cgroup_with_few_threads() {
    if !is_part("pool::in_a_cgroup_with_few_threads") {
        return;
    }
    let vm = Setup::new("job=touch mib=1 idle=1")
        .spawner(workers())
        .pool(0)
        .boot();
    vm.wait_ready(LONG).unwrap();
    let point = vm.fork_point(CloneSpec::new(1)).unwrap();
    let SpawnError::Shell(error) = point.fill_pool(2000).unwrap_err() else {
        panic!("it is not for want of shells");
    };
    let PoolError::Limits(LimitError::TooMany { room, limit, .. }) = error else {
        panic!("{error:?}");
    };
    assert_eq!(limit, Limit::ThreadsOfCgroup, "{error}");
    println!("{error}");

    // A few threads are a worker's own. There is no room for half as many more.
    let count = room * 9 / 10;
    assert_eq!(point.fill_pool(count).unwrap(), count);
    for clone in point.spawn(count).unwrap() {
        clone.wait_report(report::ACTION, 1, LONG).unwrap();
    }
}
