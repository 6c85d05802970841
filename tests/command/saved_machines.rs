//! Save, end the process, restore in another one.

use std::fs;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::process::Stdio;

use forkvm::devices::block::{Access, RawFile};
use serde_json::Value;
use tempfile::tempdir;

use super::common::need_kvm;
use super::harness::{Running, forkvm, names_in};

#[test]
fn a_guest_that_asked_to_be_saved_goes_on_in_another_process_any_number_of_times() {
    need_kvm!();
    let dir = tempdir().unwrap();
    let dir = dir.path();
    let args = [
        "run",
        "--guest",
        "save mib=8",
        "--memory",
        "64",
        "--save",
        "saved",
    ];
    let saved = forkvm(dir, &args);
    saved.expect(0, "`forkvm restore saved` lets it run on");
    assert_eq!(saved.stdout(), "", "it was ended at the save");
    for _ in 0..2 {
        let restored = forkvm(dir, &["restore", "saved"]);
        assert_eq!(restored.code(), 0, "{}", restored.stderr());
        assert_eq!(restored.stdout().trim(), "restored");
    }
    assert_eq!(names_in(dir), ["saved"]);
}

#[test]
fn a_machine_that_is_restored_lazily_goes_on_the_same_and_leaves_the_directory_as_it_is() {
    need_kvm!();
    let dir = tempdir().unwrap();
    let dir = dir.path();
    let run = ["run", "--guest", "save mib=8", "--memory", "64"];
    forkvm(dir, &[&run[..], &["--save", "saved"]].concat()).expect(0, "vm was saved");
    let before = fs::read(dir.join("saved/memory")).unwrap();
    for background in ["off", "256"] {
        let lazy = ["--memory-mode", "lazy", "--background", background];
        let restored = forkvm(dir, &[&["restore", "saved"][..], &lazy].concat());
        assert_eq!(restored.code(), 0, "{}", restored.stderr());
        assert_eq!(restored.stdout().trim(), "restored");
    }
    assert!(before == fs::read(dir.join("saved/memory")).unwrap());
}

#[test]
fn a_busy_machine_is_saved_by_ctrl_c_restored_and_saved_again() {
    need_kvm!();
    let dir = tempdir().unwrap();
    let dir = dir.path();
    super::harness::disk(dir, "d.img", 1);
    let job = "oracle mib=4 writers=1 disk=1";
    let args = ["run", "--guest", job, "--memory", "64", "--vcpus", "2"];
    let run = [&args[..], &["--disk", "d.img,overlay", "--save", "one"]].concat();
    let mut running = Running::start(dir, &run);
    running.wait_for_vm().signal("INT");
    running.wait().expect(0, "vm was saved");

    let mut running = Running::start(dir, &["restore", "one", "--save", "two"]);
    running.wait_for_vm().signal("TERM");
    running.wait().expect(0, "vm was saved");

    for saved in ["one", "two"] {
        let mut running = Running::start_with(dir, &["restore", saved], Stdio::piped());
        running
            .child()
            .stdin
            .take()
            .unwrap()
            .write_all(b"q")
            .unwrap();
        let ended = running.wait();
        assert_eq!(ended.code(), 0, "{}{}", ended.stdout(), ended.stderr());
        assert!(ended.stdout().contains("oracle done"), "{}", ended.stdout());
    }
}

#[test]
fn a_save_that_is_killed_leaves_nothing_in_the_way_of_the_next() {
    need_kvm!();
    let dir = tempdir().unwrap();
    let dir = dir.path();
    let args = [
        "run",
        "--guest",
        "touch mib=400",
        "--memory",
        "512",
        "--save",
        "saved",
    ];
    let is_partial = |name: &String| name.starts_with("saved.partial-");
    let mut killed = 0;
    for _ in 0..3 {
        let mut running = Running::start(dir, &args);
        running.wait_for_vm();
        // Without memory to write there would be no time to kill it in.
        std::thread::sleep(std::time::Duration::from_millis(700));
        running.signal("INT");
        running.wait_until("the save has begun", || {
            names_in(dir).iter().any(is_partial)
        });
        running.signal("KILL");
        running.child().wait().unwrap();
        if !dir.join("saved").exists() {
            killed += 1;
            forkvm(dir, &["restore", "saved"]).expect(1, "cannot open saved/state");
        } else {
            fs::remove_dir_all(dir.join("saved")).unwrap();
        }
    }
    assert!(killed > 0, "no save was met half-way");
    let args = [
        "run",
        "--guest",
        "save mib=1",
        "--memory",
        "64",
        "--save",
        "saved",
    ];
    forkvm(dir, &args).expect(0, "vm was saved");
    assert_eq!(names_in(dir), ["saved"]);
}

#[test]
fn state_show_tells_what_a_saved_machine_is() {
    need_kvm!();
    let dir = tempdir().unwrap();
    let dir = dir.path();
    super::harness::disk(dir, "d.img", 1);
    let args = [
        "run",
        "--guest",
        "save mib=1",
        "--memory",
        "64",
        "--vcpus",
        "2",
    ];
    let run = [
        &args[..],
        &["--disk", "d.img,ro,name=data", "--save", "saved"],
    ]
    .concat();
    assert_eq!(forkvm(dir, &run).code(), 0);
    let shown = forkvm(dir, &["state", "show", "saved", "--json", "-"]);
    let value: Value = serde_json::from_str(&shown.stdout()).unwrap();
    let kinds: Vec<&str> = value["sections"]
        .as_array()
        .unwrap()
        .iter()
        .map(|section| section["kind"].as_str().unwrap())
        .collect();
    for kind in [
        "config",
        "kvm/vcpu/1",
        "dev/doorbell",
        "identity",
        "disk/data",
    ] {
        assert!(kinds.contains(&kind), "{kind} is not in {kinds:?}");
    }
    let machine = &value["machine"];
    assert_eq!(machine["vcpus"].as_array().unwrap().len(), 2);
    assert!(
        machine["vcpus"][0]["rip"]
            .as_str()
            .unwrap()
            .starts_with("0x")
    );
    assert_eq!(machine["disks"][0]["kind"], "read-only");
    assert!(
        machine["disks"][0]["base"]
            .as_str()
            .unwrap()
            .ends_with("/d.img")
    );
    assert_eq!(value["memory"]["memory_mib"], 64);
    // The state file alone does as well, without a look at the memory.
    let text = forkvm(dir, &["state", "show", "saved/state"]).stdout();
    assert!(
        text.contains("kvm/vcpu/0") && text.contains("RIP 0x"),
        "{text}"
    );
}

#[test]
fn a_disk_that_is_not_what_it_was_is_refused_by_name() {
    need_kvm!();
    let dir = tempdir().unwrap();
    let dir = dir.path();
    let file = super::harness::disk(dir, "d.img", 1);
    let run = [
        "run",
        "--guest",
        "save mib=1",
        "--memory",
        "64",
        "--disk",
        "d.img,overlay",
    ];
    assert_eq!(
        forkvm(dir, &[&run[..], &["--save", "saved"]].concat()).code(),
        0
    );
    let restore = |said: &str| {
        forkvm(dir, &["restore", "saved"])
            .expect(1, "disk d0")
            .expect(1, said);
    };

    let writer = RawFile::open(&file, Access::ReadWrite).unwrap();
    restore("d.img cannot be opened for reading: a VM writes it");
    drop(writer);
    assert_eq!(forkvm(dir, &["restore", "saved"]).code(), 0);

    let aside = dir.join("aside.img");
    fs::rename(&file, &aside).unwrap();
    restore("d.img does not exist");
    fs::copy(&aside, &file).unwrap();
    restore("d.img has changed since the machine was saved: it is another file");
    fs::rename(&aside, &file).unwrap();
    let opened = fs::OpenOptions::new().write(true).open(&file).unwrap();
    opened.write_all_at(&[1], 0).unwrap();
    restore("d.img has changed since the machine was saved: it was written to");
    opened.set_len(512).unwrap();
    restore("d.img has changed since the machine was saved: it has 512 bytes and had 1048576");
    opened.set_len(100).unwrap();
    restore("d.img has 100 bytes");
}
