//! Options, exit codes, consoles and JSON.

use std::fs;
use std::io::Write;
use std::process::Stdio;

use forkvm::FreezeKind;
use serde_json::Value;
use tempfile::tempdir;

use super::common::need_kvm;
use super::harness::{Running, forkvm, names_in};

#[test]
fn wrong_options_end_with_2_and_say_what_is_wrong() {
    let dir = tempdir().unwrap();
    let run: &[&str] = &["run", "--guest", "hello"];
    let cases: &[(&[&str], &str)] = &[
        (&["run"], "--guest"),
        (
            &["run", "--guest", "hello", "--kernel", "k"],
            "cannot be used with",
        ),
        (&["run", "--guest", "nonsense"], "nonsense"),
        (&[run, &["--initrd", "i"]].concat(), "--initrd"),
        (&[run, &["--memory", "1"]].concat(), "16..=1048576"),
        (&[run, &["--vcpus", "17"]].concat(), "1..=16"),
        (&[run, &["--disk", "a.img,format=qcow2"]].concat(), "qcow2"),
        (&[run, &["--disk", "a.img,cache=off"]].concat(), "cache=off"),
        (
            &[run, &["--disk", "a,name=d1", "--disk", "b"]].concat(),
            "two disks are named \"d1\"",
        ),
        (
            &[run, &["--freeze", "thaw"]].concat(),
            "auto, remap, write-protect, delta, copy, stop",
        ),
        (
            &[run, &["--freeze", "remap", "--memory-mode", "lazy"]].concat(),
            "remap and copy give memory mode cow",
        ),
        (
            &["restore", "d", "--freeze", "write-protect"],
            "write-protect gives lazy",
        ),
        (&[run, &["--memory-mode", "eager"]].concat(), "cow, lazy"),
        (&[run, &["--background", "0"]].concat(), "or off"),
        (&[run, &["--name", "a/b"]].concat(), "a/b"),
        (&["restore"], "DIR"),
        (&["disk"], "commit"),
        (&["nonsense"], "nonsense"),
    ];
    for (args, said) in cases {
        forkvm(dir.path(), args).expect(2, said);
    }
    assert!(names_in(dir.path()).is_empty());
}

#[test]
fn help_teaches_by_examples() {
    let dir = tempdir().unwrap();
    for args in [
        &["--help"][..],
        &["run", "--help"],
        &["restore", "--help"],
        &["doctor", "--help"],
        &["ps", "--help"],
        &["info", "--help"],
        &["pause", "--help"],
        &["resume", "--help"],
        &["save", "--help"],
        &["fork", "--help"],
        &["kill", "--help"],
        &["wait", "--help"],
        &["console", "--help"],
    ] {
        let help = forkvm(dir.path(), args);
        assert_eq!(help.code(), 0);
        let text = help.stdout();
        assert!(text.contains("Examples:\n  forkvm "), "{args:?}: {text}");
    }
}

#[test]
fn completions_are_for_the_shell_that_is_named() {
    let dir = tempdir().unwrap();
    let bash = forkvm(dir.path(), &["completions", "bash"]);
    assert!(
        bash.stdout().contains("complete -F _forkvm"),
        "{}",
        bash.stdout()
    );
    for word in FreezeKind::ALL {
        assert!(bash.stdout().contains(word.as_str()), "{word}");
    }
    forkvm(dir.path(), &["completions", "dos"]).expect(2, "dos");
}

#[test]
fn json_on_standard_output_is_exactly_one_object_also_of_a_failure() {
    need_kvm!();
    let dir = tempdir().unwrap();
    let object = |args: &[&str]| -> Value {
        let ended = forkvm(dir.path(), &[args, &["--json", "-"]].concat());
        let stdout = ended.stdout();
        let value: Value = serde_json::from_str(&stdout).expect(&stdout);
        assert_eq!(value["forkvm"], env!("CARGO_PKG_VERSION"));
        value
    };
    let run = object(&[
        "run", "--guest", "fork n=2", "--memory", "64", "--name", "X",
    ]);
    let names: Vec<&str> = run["vms"]
        .as_array()
        .unwrap()
        .iter()
        .map(|vm| vm["name"].as_str().unwrap())
        .collect();
    assert_eq!(names.len(), 3, "{run}");
    assert!(names.contains(&"X") && names.contains(&"X.1") && names.contains(&"X.2"));
    for key in ["kvm", "cpus", "kernel", "cpu_model", "memory_mib", "load1"] {
        assert!(!run["host"][key].is_null(), "{key}");
    }
    let missing = object(&["state", "show", "nowhere"]);
    assert!(
        missing["error"].as_str().unwrap().contains("nowhere"),
        "{missing}"
    );
    let missing = object(&["run", "--guest", "hello", "--disk", "nowhere.img"]);
    assert!(
        missing["error"].as_str().unwrap().contains("nowhere.img"),
        "{missing}"
    );
}

#[test]
fn json_goes_to_a_file_beside_the_text() {
    need_kvm!();
    let dir = tempdir().unwrap();
    let ended = forkvm(
        dir.path(),
        &[
            "run", "--guest", "hello", "--memory", "64", "--json", "out.json",
        ],
    );
    assert!(
        ended.stdout().contains("hello from 1 vCPUs"),
        "{}",
        ended.stdout()
    );
    let text = fs::read(dir.path().join("out.json")).unwrap();
    let value: Value = serde_json::from_slice(&text).unwrap();
    assert_eq!(value["vms"][0]["status"], 0);
}

#[test]
fn the_command_ends_with_the_status_of_the_vm_and_prefixes_what_clones_print() {
    need_kvm!();
    let dir = tempdir().unwrap();
    let args = [
        "run",
        "--guest",
        "fork",
        "--cmdline",
        "n=3 mib=1",
        "--memory",
        "64",
    ];
    let ended = forkvm(dir.path(), &args);
    ended.expect(3, "forkvm: vm exited with status 3");
    let stdout = ended.stdout();
    for line in ["parent of 3", "[vm.1] clone 1 of 3", "[vm.3] clone 3 of 3"] {
        assert!(
            stdout.lines().any(|printed| printed == line),
            "{line:?} is not in {stdout}"
        );
    }
}

#[test]
fn forks_of_forks_work_by_every_pair_that_is_offered() {
    need_kvm!();
    let dir = tempdir().unwrap();
    let pairs = [
        ("auto", "cow"),
        ("auto", "lazy"),
        ("delta", "cow"),
        ("delta", "lazy"),
        ("copy", "cow"),
    ];
    for (freeze, mode) in pairs {
        for background in ["off", "64"] {
            let fork = ["--freeze", freeze, "--memory-mode", mode];
            let args = ["run", "--guest", "tree depth=3", "--memory", "64"];
            let args = [&args[..], &fork, &["--background", background]].concat();
            // The status is the depth of the tree: each generation has checked what it inherited.
            forkvm(dir.path(), &args).expect(3, "vm.1.1.1 exited with status 0");
        }
    }
}

#[test]
fn consoles_of_clones_go_to_a_file_each_in_the_directory_that_is_named() {
    need_kvm!();
    let dir = tempdir().unwrap();
    let args = [
        "run",
        "--guest",
        "fork n=2",
        "--memory",
        "64",
        "--console-dir",
        "logs",
        "--name",
        "X",
    ];
    let ended = forkvm(dir.path(), &args);
    assert!(!ended.stdout().contains("clone"), "{}", ended.stdout());
    assert_eq!(names_in(&dir.path().join("logs")), ["X.1.log", "X.2.log"]);
    let log = fs::read_to_string(dir.path().join("logs/X.2.log")).unwrap();
    assert!(log.contains("clone 2 of 2"), "{log}");
}

#[test]
fn what_is_piped_in_reaches_the_guests_console() {
    need_kvm!();
    let dir = tempdir().unwrap();
    let args = ["run", "--guest", "oracle mib=1", "--memory", "64"];
    let mut running = Running::start_with(dir.path(), &args, Stdio::piped());
    running
        .child()
        .stdin
        .take()
        .unwrap()
        .write_all(b"hello? no: q")
        .unwrap();
    let ended = running.wait();
    assert!(ended.stdout().contains("oracle done"), "{}", ended.stdout());
    assert_eq!(ended.code(), 0);
}

#[test]
fn an_overlay_leaves_the_file_as_it_is() {
    need_kvm!();
    let dir = tempdir().unwrap();
    let disk = super::harness::disk(dir.path(), "d.img", 8);
    let job = "blk-verify n=1 mib=1";
    let args = [
        "run",
        "--guest",
        job,
        "--memory",
        "64",
        "--disk",
        "d.img,overlay",
    ];
    assert_eq!(forkvm(dir.path(), &args).code(), 0);
    assert!(fs::read(disk).unwrap().iter().all(|&byte| byte == 0));
    assert_eq!(names_in(dir.path()), ["d.img"]);
}
