//! Workers: how many there are, who lives in which, and when they go.

use std::collections::HashMap;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use forkvm::engine::spawn::Spawner;
use forkvm::{CloneSpec, End};

use crate::common::{LONG, Setup, expect_end, need_kvm, scaled, workers, workers_of};

/// SIGKILL.
pub(crate) fn kill(process: u32) {
    let status = Command::new("kill")
        .args(["-9", &process.to_string()])
        .status();
    assert!(status.unwrap().success());
}

pub(crate) fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < LONG, "{what}: not so");
        thread::sleep(Duration::from_millis(2));
    }
}

pub(crate) fn is_gone(process: u32) -> bool {
    !Path::new(&format!("/proc/{process}")).exists()
}

#[test]
fn clones_are_spread_over_the_workers_that_are_ready_and_more_are_started_for_more() {
    need_kvm!();
    let vm = Setup::new("job=spin").spawner(workers_of(2, 4)).boot();
    vm.wait_ready(LONG).unwrap();
    let mut clones = Vec::new();
    let mut counts = |more: u32| -> Vec<u32> {
        clones.extend(vm.fork(CloneSpec::new(more)).unwrap());
        let mut counts: HashMap<u32, u32> = HashMap::new();
        for clone in &clones {
            *counts.entry(clone.member().process().unwrap()).or_default() += 1;
        }
        let mut counts: Vec<u32> = counts.into_values().collect();
        counts.sort_unstable();
        counts
    };
    assert_eq!(counts(1), [1]);
    assert_eq!(counts(3), [2, 2]);
    assert_eq!(counts(4), [4, 4]);
    assert_eq!(counts(4), [4, 4, 4]);
    let more = scaled(20, 3);
    let counts = counts(more);
    assert_eq!(counts.iter().sum::<u32>(), 12 + more);
    assert!(counts.iter().all(|count| *count <= 4), "{counts:?}");
}

#[test]
fn workers_end_with_their_spawner_and_the_last_of_their_clones() {
    need_kvm!();
    let process = workers();
    let idle = process.processes();
    assert_eq!(idle.len(), 2);
    drop(process);
    for worker in idle {
        wait_until("an idle worker ends with its spawner", || is_gone(worker));
    }

    let process = workers();
    let ready = process.processes();
    let vm = Setup::new("job=obey pages=4").spawner(process).boot();
    vm.wait_ready(LONG).unwrap();
    let clone = vm
        .fork(CloneSpec::new(1))
        .unwrap()
        .remove(0)
        .member()
        .clone();
    drop(vm);
    // The family was ended, and with it everything that held the spawner.
    assert_eq!(clone.wait().end, End::Killed);
    drop(clone);
    for worker in ready {
        wait_until("a worker ends with its spawner", || is_gone(worker));
    }
}

#[test]
fn several_families_share_the_workers_of_a_spawner() {
    need_kvm!();
    let process = workers();
    let family = || {
        let config = forkvm::FamilyConfig {
            spawner: process.clone(),
            ..forkvm::FamilyConfig::default()
        };
        let spec = forkvm::BootSpec {
            name: "vm".into(),
            memory_mib: 64,
            vcpus: 1,
            disks: Vec::new(),
            payload: forkvm::guest::bare(),
            cmdline: "job=oracle mib=1".into(),
            console: forkvm::ConsoleDevice::Serial,
        };
        forkvm::Vm::boot_with(spec, config).unwrap()
    };
    let families = [family(), family()];
    for vm in &families {
        vm.wait_ready(LONG).unwrap();
    }
    let clones: Vec<_> = families
        .iter()
        .flat_map(|vm| vm.fork(CloneSpec::new(2)).unwrap())
        .collect();
    for clone in &clones {
        let end = clone.member().wait_for(LONG).expect("it ends").end;
        assert_eq!(end, End::Exited(0), "{}", clone.member().name());
    }
    families.iter().for_each(|vm| vm.family().end());
}

#[test]
fn clones_that_outlive_every_handle_of_their_spawner_run_on() {
    need_kvm!();
    let vm = Setup::new("job=oracle mib=1").spawner(workers()).boot();
    vm.wait_ready(LONG).unwrap();
    let point = vm.fork_point(CloneSpec::new(1)).unwrap();
    let clones = point.spawn(2).unwrap();
    drop(point);
    for clone in &clones {
        expect_end(&vm, clone, End::Exited(0));
    }
}
