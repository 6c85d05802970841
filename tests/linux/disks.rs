//! Linux machines with disks: file systems of parent and clones, and a root file system.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use forkvm::CloneSpec;
use forkvm::linux::LinuxVm;

use super::common::need_kvm;
use super::harness::{Running, forkvm};
use super::machine::{Machine, PATIENCE, sh};
use super::template::Image;
use super::{ext4, template};

/// Mounts the disk of the template's machine.
const MOUNT: &str = "mkdir -p /mnt && mount -t ext4 /dev/vda /mnt";

/// Appends to an open file until it is killed: a hundred lines, a second's rest, and so on, so that others have the one vCPU as well.
const WRITER: &str = "mkfifo /tmp/never; (while :; do i=0; while [ $i -lt 100 ]; do echo line; i=$((i+1)); done; \
                      read -t 1 x <> /tmp/never; done > /mnt/open) & echo $! > /tmp/writer";

/// What `vm`, which ends, leaves on its disk, in a file.
fn end_with_disk(vm: &LinuxVm, copy: &Path) -> std::path::PathBuf {
    vm.kill();
    let finished = vm.join();
    ext4::copy(finished.disks[0].as_ref(), copy)
}

#[test]
fn file_systems_of_parent_and_clones_are_clean_and_each_ones_own() {
    need_kvm!();
    let copies = tempfile::tempdir().unwrap();
    let machine = Machine::restore(1);
    sh(&machine, &format!("{MOUNT} && echo before > /mnt/before"));
    sh(&machine, WRITER);
    let mut clones = machine.fork(CloneSpec::new(3));
    // One is killed as it writes.
    let killed = clones.remove(2);
    sh(&killed, "while [ ! -s /mnt/open ]; do :; done; sync");
    let copy = end_with_disk(&killed, &copies.path().join("killed"));
    ext4::replay(&copy);
    ext4::expect_clean(&copy);
    // The others end their writers and unmount in order.
    for vm in clones.iter().chain([&machine.vm]) {
        let name = vm.identity().name;
        let script = format!(
            "kill $(cat /tmp/writer); cat /mnt/before; echo {name} > /mnt/who; umount /mnt; \
             mount -t ext4 /dev/vda /mnt; cat /mnt/who; umount /mnt"
        );
        assert_eq!(sh(vm, &script), format!("before\n{name}"));
        let copy = end_with_disk(vm, &copies.path().join(&name));
        ext4::expect_clean(&copy);
    }
}

/// A directory with an ext4 file system of busybox and the agent, to boot from.
fn root_file_system(folder: &Path) {
    let root = folder.join("root");
    for directory in [
        "bin", "dev", "etc", "proc", "root", "run", "sbin", "sys", "tmp",
    ] {
        fs::create_dir_all(root.join(directory)).unwrap();
    }
    fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
    std::os::unix::fs::symlink("busybox", root.join("bin/sh")).unwrap();
    let agent = root.join("sbin/forkvm-agent");
    fs::write(&agent, forkvm_guest_images::AGENT).unwrap();
    fs::set_permissions(&agent, fs::Permissions::from_mode(0o755)).unwrap();
    ext4::make(&root, &folder.join("root.img"), 32);
}

#[test]
fn a_machine_boots_from_a_root_file_system_and_stops_with_a_clean_disk() {
    need_kvm!();
    let dir = tempfile::tempdir().unwrap();
    root_file_system(dir.path());
    let image = Image::find();
    let kernel = image.directory.join("vmlinux");
    let cmdline = format!("{} init=/sbin/forkvm-agent", image.cmdline);
    let args = [
        "run",
        "--name",
        "web",
        "--kernel",
        kernel.to_str().unwrap(),
        "--cmdline",
        &cmdline,
        "--rootfs",
        "root.img",
        "--memory",
        "64",
    ];
    let mut running = Running::start_with(dir.path(), &args, Stdio::null());
    let listens = dir.path().join("forkvm/web/control.sock");
    running.wait_until("it listens", || listens.exists());
    // A kernel whose ring 0 is interpreted takes a minute, longer than one command waits for an agent.
    let said = (0..12)
        .map(|_| {
            forkvm(
                dir.path(),
                &[
                    "exec",
                    "web",
                    "--",
                    "sh",
                    "-c",
                    "echo hello > /kept; cat /proc/mounts",
                ],
            )
        })
        .find(|ended| ended.code() == 0)
        .expect("the agent answers");
    let root = said.stdout();
    assert!(root.contains(" / ext4 rw"), "{root}");
    forkvm(dir.path(), &["stop", "web"]).expect(0, "");
    running.wait().expect(0, "web exited");
    let image = dir.path().join("root.img");
    ext4::expect_clean(&image);
}

#[test]
fn a_root_file_system_that_is_none_is_told_with_the_last_words_of_the_console() {
    need_kvm!();
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("root.img"), vec![7; 1 << 20]).unwrap();
    let image = Image::find();
    let kernel = image.directory.join("vmlinux");
    let refused = forkvm(
        dir.path(),
        &[
            "template",
            "create",
            "mine",
            "--kernel",
            kernel.to_str().unwrap(),
            "--cmdline",
            &image.cmdline,
            "--rootfs",
            "root.img,ro",
        ],
    );
    refused
        .expect(1, "mine did not become itself")
        .expect(1, "Unable to mount root fs");
}

/// Compresses a real file and hashes the result, again and again, and prints that on the console.
const COMPRESS: &str =
    "(while :; do gzip -c /mnt/lambda.fa | sha256sum > /dev/console; done) > /dev/null 2>&1 &";

/// The line that comes of it.
fn compressed_on_the_host() -> String {
    let script = format!(
        "busybox gzip -c {} | busybox sha256sum",
        template::data_folder().join("lambda.fa").display()
    );
    let ran = std::process::Command::new("sh")
        .args(["-c", &script])
        .output();
    let said = String::from_utf8(ran.unwrap().stdout).unwrap();
    said.trim_end().to_owned()
}

/// What the VM `name` has printed that can be a hash of sha256sum. The first one of a machine stands behind a shell's prompt, and that
/// of a clone may have been begun by its parent.
fn printed(machine: &Machine, name: &str) -> Vec<String> {
    let text = machine.consoles.text();
    let lines = text
        .lines()
        .filter_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
    let lines = lines.map(|line| line.trim_end().to_owned());
    lines.filter(|line| line.ends_with(" -")).collect()
}

/// Waits until `name` has printed `due` whole lines. All must be `expected`, or, of a line that was begun before a fork, its end.
fn expect_printed(machine: &Machine, name: &str, due: usize, expected: &str) -> usize {
    let start = Instant::now();
    loop {
        let lines = printed(machine, name);
        let whole = lines.iter().filter(|line| line.ends_with(expected)).count();
        let begun_before = |line: &String| expected.ends_with(line.as_str());
        for (number, line) in lines.iter().enumerate() {
            let right = line.ends_with(expected) || (number == 0 && begun_before(line));
            assert!(right, "{name} printed {line:?}");
        }
        if whole >= due {
            return whole;
        }
        assert!(start.elapsed() < PATIENCE, "{name} printed {lines:?}");
        thread::sleep(Duration::from_millis(20));
    }
}

fn a_busy_machine_is_forked(times: usize) {
    need_kvm!();
    // It makes the template, and what is on its disk.
    let machine = Machine::restore(1);
    let expected = compressed_on_the_host();
    sh(&machine, &format!("{MOUNT}; {COMPRESS}"));
    let name = machine.identity().name;
    for _ in 0..times {
        let done = printed(&machine, &name).len();
        // By the engine alone: a busy guest takes long to hear who it is.
        let clone = machine
            .member()
            .fork(CloneSpec::new(1))
            .unwrap()
            .clones
            .remove(0);
        expect_printed(&machine, clone.name(), 1, &expected);
        clone.kill();
        clone.wait();
        expect_printed(&machine, &name, done + 1, &expected);
    }
}

#[test]
fn a_machine_that_compresses_and_hashes_is_forked_twenty_times_without_a_wrong_result() {
    a_busy_machine_is_forked(super::common::scaled(20, 2) as usize);
}

#[test]
#[ignore = "long"]
fn a_machine_that_compresses_and_hashes_is_forked_fifty_times_without_a_wrong_result() {
    a_busy_machine_is_forked(50);
}

#[test]
fn memtester_finds_no_fault_in_parent_or_clones_across_a_fork() {
    need_kvm!();
    let machine = Machine::restore(1);
    let test = "(chroot /mnt /usr/sbin/memtester 4M 1; echo status $?) > /tmp/memtester 2>&1 &";
    sh(&machine, &format!("{MOUNT}; mkfifo /tmp/never; {test}"));
    sh(&machine, "while ! grep -q Stuck /tmp/memtester; do :; done");
    let clones = machine.fork(CloneSpec::new(2));
    for vm in clones.iter().chain([&machine.vm]) {
        let ended = "until said=$(grep status /tmp/memtester); do read -t 1 x <> /tmp/never; done; echo $said";
        let said = sh(vm, ended);
        let log = || sh(vm, "cat /tmp/memtester");
        assert_eq!(said, "status 0", "{}", log());
    }
}
