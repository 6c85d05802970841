//! `forkvm disk commit`: a disk that a VM wrote through to its file, and forked.

use std::fs;

use tempfile::tempdir;

use super::common::need_kvm;
use super::harness::{FORKED, Running, disk, forkvm, names_in};

const WRITE: [&str; 7] = [
    "run",
    "--guest",
    "blk-verify n=2 mib=16",
    "--memory",
    "64",
    "--disk",
    "d.img",
];
const COMMIT: [&str; 3] = ["disk", "commit", "d.img"];

#[test]
fn a_forked_disk_is_merged_once_no_vm_needs_it_also_after_a_kill() {
    need_kvm!();
    let dir = tempdir().unwrap();
    let dir = dir.path();
    disk(dir, "d.img", 16);
    forkvm(dir, &COMMIT).expect(1, "d.img is not the base of a fork");

    let mut running = Running::start(dir, &WRITE);
    running.wait_until_said(FORKED);
    forkvm(dir, &COMMIT).expect(1, "d.img is in use");
    running.signal("KILL");
    running.child().wait().unwrap();

    let refused = forkvm(
        dir,
        &[
            "run", "--guest", "hello", "--memory", "64", "--disk", "d.img",
        ],
    );
    // The disk by its full name, so that the command can be given from anywhere.
    let path = dir.canonicalize().unwrap().join("d.img");
    refused.expect(1, &format!("`forkvm disk commit {}`", path.display()));
    let merged = forkvm(dir, &COMMIT);
    assert_eq!(merged.code(), 0, "{}", merged.stderr());
    assert!(
        merged.stdout().contains("d.img.overlay-1 into d.img"),
        "{}",
        merged.stdout()
    );
    assert_eq!(names_in(dir), ["d.img"]);
    let again = forkvm(
        dir,
        &[
            "run", "--guest", "hello", "--memory", "64", "--disk", "d.img",
        ],
    );
    assert_eq!(again.code(), 0, "{}", again.stderr());
}

#[test]
fn what_the_parent_wrote_after_the_fork_is_in_the_file_after_the_merge() {
    need_kvm!();
    let dir = tempdir().unwrap();
    let dir = dir.path();
    let file = disk(dir, "d.img", 1);
    let job = "blk-verify n=1 mib=1";
    let ended = forkvm(
        dir,
        &["run", "--guest", job, "--memory", "64", "--disk", "d.img"],
    );
    assert_eq!(ended.code(), 0, "{}", ended.stderr());
    let at_the_fork = fs::read(&file).unwrap();
    assert_eq!(forkvm(dir, &COMMIT).code(), 0);
    assert_ne!(fs::read(&file).unwrap(), at_the_fork);
}

#[test]
fn what_the_parent_wrote_and_did_not_flush_is_merged_after_ctrl_c() {
    need_kvm!();
    let dir = tempdir().unwrap();
    let dir = dir.path();
    disk(dir, "d.img", 32);
    let args = [
        "run",
        "--guest",
        "blk-verify n=1 mib=16",
        "--memory",
        "64",
        "--disk",
        "d.img",
    ];
    let mut running = Running::start(dir, &args);
    running.wait_until_said(FORKED);
    running.signal("INT");
    assert_eq!(running.wait().code(), 130);
    let merged = forkvm(dir, &[&COMMIT[..], &["--json", "-"]].concat());
    assert_eq!(merged.code(), 0, "{}", merged.stderr());
    let report: serde_json::Value = serde_json::from_str(&merged.stdout()).unwrap();
    assert!(report["merged_kib"].as_u64().unwrap() > 0, "{report}");
}
