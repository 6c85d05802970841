//! The trace of `--log` and `FORKVM_LOG`, as far as users are told to look there.

use std::process::Command;

use tempfile::tempdir;

use super::common::need_kvm;
use super::doctor::as_nobody_with_kvm;
use super::harness::forkvm;

const SHARED: &str = "the first fork of a VM that maps its memory shared copies nothing";
const LAZY: &str = "clones are lazy and the VM maps its memory shared";
const PRIVATE: &str = "the VM maps its memory privately: only what it has written is looked at";
const PLAIN_USER: &str =
    "the VM maps its memory privately and there is no userfaultfd for kernel mode";

/// Which freeze `auto` chose at each fork that the trace `said` tells of, and why.
fn chosen(said: &str) -> Vec<(String, String)> {
    let told = |line| {
        let (_, freeze) = str::split_once(line, "asked=auto chosen=")?;
        let (freeze, why) = freeze.split_once(" why=\"")?;
        Some((freeze.to_owned(), why.split('"').next()?.to_owned()))
    };
    said.lines().filter_map(told).collect()
}

fn owned(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    let owned = |(freeze, why): &(&str, &str)| ((*freeze).to_owned(), (*why).to_owned());
    pairs.iter().map(owned).collect()
}

#[test]
fn the_trace_names_the_freeze_that_auto_chose_and_the_reason() {
    need_kvm!();
    let dir = tempdir().unwrap();
    for (mode, first) in [
        ("cow", ("remap", SHARED)),
        ("lazy", ("write-protect", LAZY)),
    ] {
        let log = ["--log", "forkvm_clone_engine=debug"];
        let args = ["run", "--guest", "tree depth=2", "--memory-mode", mode];
        let ended = forkvm(dir.path(), &[&args[..], &log].concat());
        let said = ended.stderr();
        if mode == "lazy" && said.contains("no userfaultfd for kernel mode") {
            println!("skipped: lazy memory, for a user without userfaultfd");
            continue;
        }
        assert_eq!(ended.code(), 2, "{said}");
        assert_eq!(
            chosen(&said),
            owned(&[first, ("delta", PRIVATE)]),
            "{mode}: {said}"
        );
    }
    // By the environment, as programs that embed the command set it; nothing is said without being asked.
    for (filter, expected) in [("debug", &[("remap", SHARED)][..]), ("warn", &[])] {
        let ended = Command::new(env!("CARGO_BIN_EXE_forkvm"))
            .args(["run", "--guest", "fork n=1"])
            .current_dir(dir.path())
            .env("XDG_RUNTIME_DIR", dir.path())
            .env("FORKVM_LOG", filter)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(ended.status.code(), Some(1), "{said}");
        assert_eq!(chosen(&said), owned(expected), "{filter}: {said}");
    }
}

#[test]
fn a_user_without_userfaultfd_forks_by_remap_once_and_by_copy_after() {
    need_kvm!();
    let run = "run --guest 'tree depth=2' --log forkvm_clone_engine=debug";
    let Some(ended) = as_nobody_with_kvm(run) else {
        return;
    };
    let said = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(2), "{said}");
    let copied = owned(&[("remap", SHARED), ("copy", PLAIN_USER)]);
    assert_eq!(chosen(&said), copied, "{said}");
}
