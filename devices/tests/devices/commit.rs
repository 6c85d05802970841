//! `forkvm disk commit`: the way back from a forked disk to a plain one.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;

use forkvm_devices::block::{
    Access, BlockLayer, CommitError, Overlay, OverlayError, RawFile, SECTOR, commit,
};
use tempfile::TempDir;

use crate::block_layers::{LEN, numbered_disk, read};

/// A disk that was forked; its VM wrote sectors 1 and 60, discarded sector 2, and ended.
struct Forked {
    directory: TempDir,
    disk: PathBuf,
    overlay: PathBuf,
}

impl Forked {
    fn new() -> Forked {
        let directory = TempDir::new().unwrap();
        let (disk, overlay) = (
            directory.path().join("disk"),
            directory.path().join("overlay"),
        );
        numbered_disk(&disk);
        let raw = Arc::new(RawFile::open(&disk, Access::ReadWrite).unwrap());
        let top = Overlay::create(&overlay, raw.clone()).unwrap();
        raw.freeze_as_base(&overlay).unwrap();
        top.write_at(SECTOR, &[0xaa; 512]).unwrap();
        top.write_at(60 * SECTOR, &[0xbb; 512]).unwrap();
        top.discard(2 * SECTOR..3 * SECTOR).unwrap();
        Forked {
            directory,
            disk,
            overlay,
        }
    }

    fn mark(&self) -> PathBuf {
        self.directory.path().join("disk.forkvm-base")
    }

    fn commit(&self) -> Result<u64, CommitError> {
        commit(&self.disk, &mut |_, _| {}).map(|report| report.merged_bytes)
    }

    fn assert_merged(&self) {
        let raw = RawFile::open(&self.disk, Access::ReadWrite).unwrap();
        let mut expected: Vec<u8> = (0..LEN).map(|at| (at / SECTOR) as u8 + 1).collect();
        expected[512..1024].fill(0xaa);
        expected[1024..1536].fill(0);
        expected[60 * 512..61 * 512].fill(0xbb);
        assert_eq!(read(&raw, 0, LEN), expected);
        let files = fs::read_dir(self.directory.path()).unwrap().count();
        assert_eq!(files, 1, "overlay, map and mark are gone");
    }
}

#[test]
fn a_commit_merges_the_overlay_and_makes_the_disk_a_plain_one() {
    let forked = Forked::new();
    let mut told = Vec::new();
    let report = commit(&forked.disk, &mut |done, total| told.push((done, total))).unwrap();
    assert_eq!(report.merged_bytes, 3 * SECTOR);
    assert_eq!(report.overlays, std::slice::from_ref(&forked.overlay));
    assert_eq!(told.last(), Some(&(3 * SECTOR, 3 * SECTOR)));
    forked.assert_merged();
}

#[test]
fn a_disk_that_was_not_forked_has_nothing_to_commit() {
    let forked = Forked::new();
    forked.commit().unwrap();
    assert!(matches!(
        forked.commit(),
        Err(CommitError::NotForked { .. })
    ));
}

#[test]
fn a_commit_is_refused_while_anybody_has_the_base_open() {
    let forked = Forked::new();
    let clone = RawFile::open(&forked.disk, Access::ReadOnly).unwrap();
    assert!(matches!(
        forked.commit(),
        Err(CommitError::BaseInUse { .. })
    ));
    drop(clone);
    forked.commit().unwrap();
}

#[test]
fn a_commit_is_refused_while_a_vm_has_the_overlay_open() {
    let forked = Forked::new();
    // By descriptor passing a VM may hold the overlay without the lock of this base.
    let elsewhere = forked.directory.path().join("copy");
    fs::copy(&forked.disk, &elsewhere).unwrap();
    let base = Arc::new(RawFile::open(&elsewhere, Access::ReadOnly).unwrap());
    let open = Overlay::open(&forked.overlay, base).unwrap();
    let refused = forked.commit();
    assert!(matches!(
        refused,
        Err(CommitError::Overlay(OverlayError::Locked { .. }))
    ));
    drop(open);
    fs::remove_file(elsewhere).unwrap();
    forked.commit().unwrap();
    forked.assert_merged();
}

#[test]
fn the_overlays_of_several_forks_are_merged_with_the_last_one_on_top() {
    let directory = TempDir::new().unwrap();
    let disk = directory.path().join("disk");
    numbered_disk(&disk);
    let base = Arc::new(RawFile::open(&disk, Access::ReadWrite).unwrap());
    let mut top: Arc<dyn BlockLayer> = base.clone();
    for (fork, name) in [(1u8, "one"), (2, "two")] {
        let path = directory.path().join(name);
        let overlay = Overlay::create(&path, top).unwrap();
        base.freeze_as_base(&path).unwrap();
        overlay.write_at(0, &[fork; 512]).unwrap();
        overlay
            .write_at(512 * u64::from(fork), &[fork; 512])
            .unwrap();
        overlay.flush().unwrap();
        top = Arc::new(overlay);
    }
    drop((top, base));
    let report = commit(&disk, &mut |_, _| {}).unwrap();
    assert_eq!(report.overlays.len(), 2);
    let merged = fs::read(&disk).unwrap();
    assert_eq!(merged[0], 2, "the later fork's sector is on top");
    assert_eq!((merged[512], merged[1024]), (1, 2));
    assert_eq!(
        fs::read_dir(directory.path()).unwrap().count(),
        1,
        "only the disk is left"
    );
    RawFile::open(&disk, Access::ReadWrite).unwrap();
}

#[test]
fn nothing_is_merged_when_one_of_several_overlays_is_missing() {
    let forked = Forked::new();
    let mark = fs::read_to_string(forked.mark()).unwrap();
    let before = fs::read(&forked.disk).unwrap();
    let (start, end) = mark.split_once(']').unwrap();
    fs::write(
        forked.mark(),
        format!("{start}, \"/no/such/overlay\"]{end}"),
    )
    .unwrap();
    let error = forked.commit().unwrap_err();
    assert!(
        matches!(&error, CommitError::OverlayMissing { overlay, .. } if overlay.ends_with("overlay"))
    );
    assert_eq!(fs::read(&forked.disk).unwrap(), before);
}

#[test]
fn a_missing_overlay_is_named_and_nothing_changes() {
    let forked = Forked::new();
    Overlay::remove_files(&forked.overlay).unwrap();
    let error = forked.commit().unwrap_err();
    assert!(
        matches!(error, CommitError::OverlayMissing { .. }),
        "{error}"
    );
    assert!(forked.mark().exists());
}

#[test]
fn a_damaged_overlay_is_not_merged() {
    let forked = Forked::new();
    let before = fs::read(&forked.disk).unwrap();
    let map = forked.directory.path().join("overlay.map");
    let mut bytes = fs::read(&map).unwrap();
    bytes[20] ^= 1;
    fs::write(map, bytes).unwrap();
    assert!(matches!(
        forked.commit(),
        Err(CommitError::Overlay(OverlayError::Map(_)))
    ));
    assert_eq!(fs::read(&forked.disk).unwrap(), before);
}

#[test]
fn the_overlay_stays_until_the_mark_says_that_it_is_merged() {
    let forked = Forked::new();
    // The mark is written under this name first.
    let obstacle = forked.directory.path().join("disk.forkvm-base.new");
    fs::create_dir(&obstacle).unwrap();
    assert!(matches!(forked.commit(), Err(CommitError::Mark(_))));
    assert!(forked.overlay.exists() && forked.directory.path().join("overlay.map").exists());
    fs::remove_dir(obstacle).unwrap();
    forked.commit().unwrap();
    forked.assert_merged();
}

#[test]
fn a_commit_that_was_killed_while_it_merged_is_finished_by_the_same_command() {
    let forked = Forked::new();
    let mut calls = 0;
    let killed = catch_unwind(AssertUnwindSafe(|| {
        commit(&forked.disk, &mut |_, _| {
            calls += 1;
            assert!(calls < 2, "killed here");
        })
    }));
    assert!(killed.is_err());
    assert!(RawFile::open(&forked.disk, Access::ReadWrite).is_err());
    forked.commit().unwrap();
    forked.assert_merged();
}

#[test]
fn a_commit_that_was_killed_while_it_removed_its_files_is_finished_by_the_same_command() {
    let leftovers: [&[&str]; 3] = [&["overlay", "overlay.map"], &["overlay.map"], &[]];
    for left in leftovers {
        let forked = Forked::new();
        let in_directory = |name: &str| forked.directory.path().join(name);
        let mark = fs::read_to_string(forked.mark()).unwrap();
        let kept: Vec<_> = left
            .iter()
            .map(|name| fs::read(in_directory(name)).unwrap())
            .collect();
        forked.commit().unwrap();
        // Back to the moment between two steps: the mark says merged, some files are still there.
        fs::write(forked.mark(), mark.replace("frozen\"", "merged\"")).unwrap();
        for (name, content) in left.iter().zip(kept) {
            fs::write(in_directory(name), content).unwrap();
        }
        assert!(RawFile::open(&forked.disk, Access::ReadWrite).is_err());
        assert_eq!(forked.commit().unwrap(), 0);
        forked.assert_merged();
    }
}
