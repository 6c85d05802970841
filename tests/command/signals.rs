//! What Ctrl-C, SIGTERM and a second one do.

use std::fs;

use tempfile::tempdir;

use super::common::need_kvm;
use super::harness::{FORKED, Running, disk, names_in};

/// A family of a parent and two clones that are busy for long.
const BUSY_FAMILY: [&str; 7] = [
    "run",
    "--guest",
    "blk-verify n=2 mib=32",
    "--memory",
    "64",
    "--disk",
    "d.img,overlay",
];

#[test]
fn ctrl_c_and_sigterm_end_a_family_and_leave_no_file() {
    need_kvm!();
    for (signal, code) in [("INT", 130), ("TERM", 143)] {
        let dir = tempdir().unwrap();
        disk(dir.path(), "d.img", 32);
        let mut running = Running::start(dir.path(), &BUSY_FAMILY);
        running.wait_until_said(FORKED).signal(signal);
        let ended = running.wait();
        ended.expect(code, "forkvm: vm was killed");
        ended.expect(code, "forkvm: vm.1 was killed");
        ended.expect(code, "forkvm: vm.2 was killed");
        assert_eq!(names_in(dir.path()), ["d.img"]);
    }
}

#[test]
fn ctrl_c_saves_the_vm_and_ends_its_clones() {
    need_kvm!();
    let dir = tempdir().unwrap();
    disk(dir.path(), "d.img", 32);
    let args = [&BUSY_FAMILY[..], &["--save", "saved"]].concat();
    let mut running = Running::start(dir.path(), &args);
    running.wait_until_said(FORKED).signal("INT");
    let ended = running.wait();
    ended.expect(0, "forkvm: vm was saved");
    ended.expect(0, "forkvm: vm.1 was killed");
    assert_eq!(names_in(dir.path()), ["d.img", "saved"]);
}

#[test]
fn what_cannot_be_saved_runs_on_until_a_second_signal_ends_it_at_once() {
    need_kvm!();
    let dir = tempdir().unwrap();
    let args = [
        "run", "--guest", "spin", "--memory", "64", "--save", "saved",
    ];
    let mut running = Running::start(dir.path(), &args);
    running.wait_for_vm();
    fs::create_dir(dir.path().join("saved")).unwrap();
    let asked = std::time::Instant::now();
    running.signal("INT");
    // Long enough for a save to be tried, and a process that had given up would be gone.
    while asked.elapsed() < std::time::Duration::from_secs(1) {
        assert!(running.child().try_wait().unwrap().is_none());
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    running.signal("TERM");
    let ended = running.wait();
    ended.expect(143, "saved: it exists already");
    ended.expect(143, "vm runs on");
}

#[test]
fn a_place_that_is_taken_is_refused_before_the_vm_runs() {
    let dir = tempdir().unwrap();
    fs::create_dir(dir.path().join("saved")).unwrap();
    let args = [
        "run", "--guest", "hello", "--memory", "64", "--save", "saved",
    ];
    super::harness::forkvm(dir.path(), &args).expect(1, "saved: it exists already");
}
