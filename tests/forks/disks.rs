//! Disks over a fork: what was written before it is there in every VM, what is written afterwards
//! only in the VM that wrote it, and the file that was forked is frozen until it is committed.

use std::env;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use forkvm::devices::block::{Access, BlockLayer, CommitError, RawFile, RawFileError, commit};
use forkvm::engine::Phase;
use forkvm::{CloneSpec, DiskSource, End, Finished};

use crate::common::{Guest, LONG, Setup, expect_end, expect_oracle_ok, finish_oracle, need_kvm};

const MIB: u64 = 1 << 20;

/// A disk of `mib` MiB of zeros in `folder`, read-only.
pub(crate) fn zeroed_disk(folder: &Path, mib: u64) -> Arc<RawFile> {
    let path = folder.join("zeros.raw");
    File::create(&path).unwrap().set_len(mib * MIB).unwrap();
    Arc::new(RawFile::open(&path, Access::ReadOnly).unwrap())
}

/// A raw disk of 1 MiB in a folder of its own.
fn raw_disk() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.raw");
    File::create(&path).unwrap().set_len(MIB).unwrap();
    (folder, path)
}

/// The disk at `path`, open for writing.
fn raw(path: &Path) -> DiskSource {
    DiskSource::Raw(Arc::new(RawFile::open(path, Access::ReadWrite).unwrap()))
}

/// An oracle that writes to the disk at `path` all the time.
fn writer(path: &Path) -> Guest {
    let vm = Setup::new("job=oracle mib=1 disk=1").disk(raw(path)).boot();
    vm.wait_ready(LONG).unwrap();
    vm
}

fn fork_and_verify(vm: &Guest, clones: u32, fork: u32) {
    let clones = vm.fork(CloneSpec::new(clones)).unwrap();
    clones
        .iter()
        .for_each(|clone| expect_end(vm, clone.member(), End::Exited(0)));
    expect_oracle_ok(vm, vm.member(), fork);
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort_unstable();
    names
}

fn content(disk: &dyn BlockLayer) -> Vec<u8> {
    let mut bytes = vec![0; disk.len() as usize];
    disk.read_at(0, &mut bytes).unwrap();
    bytes
}

fn first_disk(finished: &Finished) -> Vec<u8> {
    content(finished.disks[0].as_ref())
}

#[test]
fn each_vm_of_a_fork_made_by_the_guest_reads_what_it_wrote_itself() {
    need_kvm!();
    let folder = tempfile::tempdir().unwrap();
    let base = zeroed_disk(folder.path(), 1);
    let vm = Setup::new("job=blk-verify mib=1 n=2")
        .disk(DiskSource::volatile(base.clone()))
        .boot();
    expect_end(&vm, vm.member(), End::Exited(0));
    let clones = vm.log.clones();
    clones
        .iter()
        .for_each(|clone| expect_end(&vm, clone, End::Exited(0)));
    let mut contents: Vec<_> = clones
        .iter()
        .map(|clone| first_disk(&clone.wait()))
        .collect();
    contents.push(first_disk(&vm.join()));
    assert!(contents[0] != contents[1] && contents[1] != contents[2] && contents[0] != contents[2]);
    assert!(
        content(base.as_ref()).iter().all(|&byte| byte == 0),
        "the base is as it was"
    );
}

#[test]
fn the_file_that_was_forked_never_changes_again() {
    need_kvm!();
    let (_folder, path) = raw_disk();
    let at_the_fork = Arc::new(Mutex::new(Vec::new()));
    let (seen, file) = (at_the_fork.clone(), path.clone());
    let vm = Setup::new("job=oracle mib=1 disk=1")
        .disk(raw(&path))
        .hook(move |phase, _| {
            if phase == Phase::Resume {
                *seen.lock().unwrap() = fs::read(&file).unwrap();
            }
            Ok(())
        });
    let vm = vm.boot();
    vm.wait_ready(LONG).unwrap();
    fork_and_verify(&vm, 2, 1);
    thread::sleep(Duration::from_millis(10));
    finish_oracle(&vm, vm.member());
    let frozen = at_the_fork.lock().unwrap();
    assert!(
        frozen.iter().any(|&byte| byte != 0),
        "the guest wrote before the fork"
    );
    assert!(
        *frozen == fs::read(&path).unwrap(),
        "nobody wrote to the base"
    );
    assert!(
        *frozen != first_disk(&vm.join()),
        "the parent wrote on, elsewhere"
    );
}

#[test]
fn a_fork_leaves_a_mark_and_the_parents_overlay_beside_the_disk_and_nothing_of_the_clones() {
    need_kvm!();
    let (folder, path) = raw_disk();
    let vm = writer(&path);
    assert_eq!(names(folder.path()), ["disk.raw"]);
    fork_and_verify(&vm, 3, 1);
    let names = names(folder.path());
    assert!(
        names.contains(&"disk.raw.forkvm-base".to_owned()),
        "{names:?}"
    );
    assert!(
        names.contains(&"disk.raw.overlay-1".to_owned()),
        "{names:?}"
    );
    let overlays = |name: &&String| name.contains("overlay") && !name.contains("overlay-1");
    assert_eq!(names.iter().filter(overlays).count(), 0, "{names:?}");
}

/// `forkvm run` and everybody else opens disks this way.
fn expect_frozen(path: &Path, overlays: usize) {
    let refused = RawFile::open(path, Access::ReadWrite).unwrap_err();
    let text = refused.to_string();
    let RawFileError::FrozenBase {
        overlays: named, ..
    } = refused
    else {
        panic!("{text}");
    };
    assert_eq!(named.len(), overlays, "{text}");
    assert!(
        named
            .iter()
            .all(|overlay| text.contains(&*overlay.to_string_lossy())),
        "{text}"
    );
    assert!(text.contains("disk commit"), "{text}");
}

#[test]
fn a_forked_disk_is_refused_to_writers_by_name_until_it_is_committed() {
    need_kvm!();
    let (folder, path) = raw_disk();
    let vm = writer(&path);
    fork_and_verify(&vm, 1, 1);
    let in_use = commit(&path, &mut |_, _| ()).unwrap_err();
    assert!(
        matches!(in_use, CommitError::BaseInUse { .. }),
        "{in_use:?}"
    );
    finish_oracle(&vm, vm.member());
    let last = first_disk(&vm.join());
    drop(vm);

    expect_frozen(&path, 1);
    commit(&path, &mut |_, _| ()).unwrap();
    assert!(
        fs::read(&path).unwrap() == last,
        "the disk is what the parent left"
    );
    assert_eq!(names(folder.path()), ["disk.raw"]);
    drop(raw(&path));
}

/// Waits until the guest has written to the overlay at `path`: a fork does not stack on an empty one.
fn wait_written(path: &Path) {
    let until = Instant::now() + LONG;
    while fs::metadata(path).unwrap().blocks() == 0 {
        assert!(Instant::now() < until, "nothing is written to {path:?}");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_disk_that_was_forked_twice_keeps_all_instants_apart_and_is_committed_to_the_last() {
    need_kvm!();
    let (folder, path) = raw_disk();
    let vm = writer(&path);
    fork_and_verify(&vm, 1, 1);
    wait_written(&folder.path().join("disk.raw.overlay-1"));
    fork_and_verify(&vm, 1, 2);
    finish_oracle(&vm, vm.member());
    let last = first_disk(&vm.join());
    drop(vm);
    expect_frozen(&path, 2);
    commit(&path, &mut |_, _| ()).unwrap();
    assert!(
        fs::read(&path).unwrap() == last,
        "the disk is what the parent left"
    );
    assert_eq!(names(folder.path()), ["disk.raw"]);
}

/// Names the disk to the part of a test that is killed.
const DISK_OF_THE_KILLED: &str = "FORKVM_TEST_DISK";

#[test]
fn a_forked_disk_stays_frozen_when_the_process_is_killed_and_can_be_committed() {
    need_kvm!();
    let (folder, path) = raw_disk();
    let mut child = Command::new(env::current_exe().unwrap())
        .args([
            "--exact",
            "disks::fork_and_wait_to_be_killed",
            "--ignored",
            "--nocapture",
        ])
        .env(DISK_OF_THE_KILLED, &path)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let forked = lines.any(|line| line.unwrap().contains("forked, and written since"));
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(forked, "the child forked");

    expect_frozen(&path, 1);
    let before = fs::read(&path).unwrap();
    commit(&path, &mut |_, _| ()).unwrap();
    assert!(fs::read(&path).unwrap().len() == before.len());
    assert_eq!(names(folder.path()), ["disk.raw"]);
    // The next run finds nothing in its way.
    let vm = writer(&path);
    fork_and_verify(&vm, 1, 1);
    finish_oracle(&vm, vm.member());
}

#[test]
#[ignore = "a_forked_disk_stays_frozen_when_the_process_is_killed_and_can_be_committed runs it"]
fn fork_and_wait_to_be_killed() {
    let Some(path) = env::var_os(DISK_OF_THE_KILLED) else {
        println!("skipped: only a part of another test");
        return;
    };
    let vm = writer(Path::new(&path));
    fork_and_verify(&vm, 1, 1);
    println!("forked, and written since");
    thread::sleep(LONG);
}
