//! Disks of saved machines: what is kept, what is refused.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use forkvm::devices::block::{Access, RawFile, commit};
use forkvm::engine::saved::OpenMachine;
use forkvm::{DiskSource, End};
use tempfile::tempdir;

use super::common::need_kvm;
use super::home::{Home, names_in};

/// The oracle, which writes to disk 0 without pause and knows what must be on it.
const WRITER: &str = "job=oracle mib=1 writers=1 disk=1";

fn open(path: &Path, access: Access) -> Arc<RawFile> {
    Arc::new(RawFile::open(path, access).unwrap())
}

/// A raw disk of `mib` MiB of zeros.
fn disk(dir: &Path, name: &str, mib: u64) -> PathBuf {
    let path = dir.join(name);
    fs::File::create(&path).unwrap().set_len(mib << 20).unwrap();
    path
}

fn why_not(dir: &Path) -> String {
    match OpenMachine::open(dir) {
        Ok(_) => "it was opened".into(),
        Err(error) => format!("{:#}", anyhow::Error::from(error)),
    }
}

#[test]
fn what_a_vm_wrote_to_memory_is_kept_through_forks_and_saves() {
    need_kvm!();
    let dir = tempdir().unwrap();
    let file = disk(dir.path(), "d.img", 1);
    let (one, two) = (dir.path().join("one"), dir.path().join("two"));
    {
        // The fork stacks a second layer in memory over the first.
        let home = Home::saving_to(&one);
        let source = DiskSource::volatile(open(&file, Access::ReadOnly));
        let vm = home.boot(1, Some(source), WRITER);
        home.expect_well(&home.verify_by_a_fork(&vm));
        vm.save().unwrap();
    }
    {
        let home = Home::saving_to(&two);
        let vm = home.restore(&one);
        home.expect_well(&home.verify_by_a_fork(&vm));
        vm.save().unwrap();
    }
    // Both at once: neither is written.
    let homes = [&one, &two].map(|saved| {
        let home = Home::saving_to(&dir.path().join("again"));
        let vm = home.restore(saved);
        (home, vm)
    });
    for (home, vm) in homes {
        home.expect_well(&home.verify_by_a_fork(&vm));
        home.quit(&vm);
    }
    assert!(fs::read(file).unwrap().iter().all(|&byte| byte == 0));
}

#[test]
fn a_disk_that_is_written_through_goes_on_once() {
    need_kvm!();
    let dir = tempdir().unwrap();
    let file = disk(dir.path(), "d.img", 1);
    let saved = dir.path().join("saved");
    {
        let home = Home::saving_to(&saved);
        let source = DiskSource::Raw(open(&file, Access::ReadWrite));
        home.boot(1, Some(source), WRITER).save().unwrap();
    }
    {
        let home = Home::saving_to(&dir.path().join("again"));
        let vm = home.restore(&saved);
        assert!(why_not(&saved).contains("cannot be opened for writing: another VM has it open"));
        home.expect_well(&home.verify_by_a_fork(&vm));
        home.quit(&vm);
    }
    // That fork made the file a frozen base, and what the machine wrote is in an overlay.
    assert!(
        why_not(&saved).contains("forkvm disk commit"),
        "{}",
        why_not(&saved)
    );
    commit(&file, &mut |_, _| {}).unwrap();
    assert!(
        why_not(&saved).contains("d.img has changed"),
        "{}",
        why_not(&saved)
    );
}

#[test]
fn a_disk_that_was_forked_goes_on_in_its_overlay_and_can_be_forked_again() {
    need_kvm!();
    let dir = tempdir().unwrap();
    let file = disk(dir.path(), "d.img", 1);
    let saved = dir.path().join("saved");
    {
        let home = Home::saving_to(&saved);
        let source = DiskSource::Raw(open(&file, Access::ReadWrite));
        let vm = home.boot(1, Some(source), WRITER);
        home.expect_well(&home.verify_by_a_fork(&vm));
        vm.save().unwrap();
    }
    {
        let home = Home::saving_to(&dir.path().join("again"));
        let vm = home.restore(&saved);
        assert!(
            why_not(&saved).contains("overlay-1 is open in a VM"),
            "{}",
            why_not(&saved)
        );
        home.expect_well(&home.verify_by_a_fork(&vm));
        home.quit(&vm);
    }
    assert_eq!(
        names_in(dir.path()),
        [
            "d.img",
            "d.img.forkvm-base",
            "d.img.overlay-1",
            "d.img.overlay-1.map",
            "d.img.overlay-2",
            "d.img.overlay-2.map",
            "saved",
        ]
    );
    // Whoever wrote the first overlay now would pull the ground from under the second.
    assert!(why_not(&saved).contains("overlay-2"), "{}", why_not(&saved));
    commit(&file, &mut |_, _| {}).unwrap();
}

#[test]
fn a_clone_of_a_vm_that_writes_through_is_saved_over_the_frozen_base() {
    need_kvm!();
    let dir = tempdir().unwrap();
    let file = disk(dir.path(), "d.img", 1);
    let saved = dir.path().join("saved");
    {
        let home = Home::saving_to(&saved);
        let source = DiskSource::Raw(open(&file, Access::ReadWrite));
        let vm = home.boot(1, Some(source), "job=oracle mib=1 writers=1 disk=1 go-on=1");
        let clone = home.verify_by_a_fork(&vm);
        clone.save().unwrap();
        assert_eq!(clone.wait().end, End::Saved);
    }
    let saved = dir.path().join("saved-vm.1");
    for _ in 0..2 {
        let home = Home::saving_to(&dir.path().join("again"));
        let vm = home.restore(&saved);
        home.verify_by_a_fork(&vm);
    }
    // The merge of what the parent wrote takes the clone's base away.
    commit(&file, &mut |_, _| {}).unwrap();
    assert!(
        why_not(&saved).contains("d.img has changed"),
        "{}",
        why_not(&saved)
    );
}
