//! Opening disks and overlays: who may, and what the refusal says.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use forkvm_devices::block::{
    Access, BlockLayer, MapError, MarkError, Overlay, OverlayError, RawFile, RawFileError, SECTOR,
    commit,
};
use tempfile::TempDir;

use crate::block_layers::{LEN, numbered_base, numbered_disk, read};

struct Place {
    directory: TempDir,
    disk: PathBuf,
    overlay: PathBuf,
}

fn place() -> Place {
    let directory = TempDir::new().unwrap();
    let disk = directory.path().join("disk");
    let overlay = directory.path().join("disk.overlay");
    numbered_disk(&disk);
    Place {
        directory,
        disk,
        overlay,
    }
}

fn open(place: &Place, access: Access) -> Result<RawFile, RawFileError> {
    RawFile::open(&place.disk, access)
}

#[test]
fn a_missing_disk_a_directory_and_a_short_disk_are_named() {
    let place = place();
    let missing = RawFile::open(place.directory.path().join("none"), Access::ReadOnly);
    let error = missing.unwrap_err();
    assert!(matches!(error, RawFileError::Missing { .. }));
    assert!(error.to_string().contains("none"), "{error}");
    for access in [Access::ReadOnly, Access::ReadWrite] {
        let error = RawFile::open(place.directory.path(), access).unwrap_err();
        assert!(matches!(error, RawFileError::NotAFile { .. }), "{error}");
    }
    for len in [0, 511, 513] {
        File::options()
            .write(true)
            .open(&place.disk)
            .unwrap()
            .set_len(len)
            .unwrap();
        let error = open(&place, Access::ReadOnly).unwrap_err();
        assert!(
            matches!(error, RawFileError::Size { len: named, .. } if named == len),
            "{error}"
        );
    }
}

#[test]
fn a_disk_has_one_writer_or_many_readers() {
    let place = place();
    let writer = open(&place, Access::ReadWrite).unwrap();
    for access in [Access::ReadOnly, Access::ReadWrite] {
        let error = open(&place, access).unwrap_err();
        assert!(matches!(error, RawFileError::Locked { .. }), "{error}");
    }
    drop(writer);
    let _readers = [(); 2].map(|()| open(&place, Access::ReadOnly).unwrap());
    assert!(matches!(
        open(&place, Access::ReadWrite),
        Err(RawFileError::Locked { .. })
    ));
}

#[test]
fn a_descriptor_is_as_good_as_a_path() {
    let place = place();
    let file = File::options()
        .read(true)
        .write(true)
        .open(&place.disk)
        .unwrap();
    let raw = RawFile::from_file(file, &place.disk, Access::ReadWrite).unwrap();
    raw.write_at(0, &[5; 512]).unwrap();
    assert_eq!(read(&raw, 0, SECTOR), [5; 512]);
    assert!(
        open(&place, Access::ReadWrite).is_err(),
        "it is locked as well"
    );
}

#[test]
fn a_truncated_disk_fails_reads_beyond_its_end() {
    let place = place();
    let raw = open(&place, Access::ReadOnly).unwrap();
    File::options()
        .write(true)
        .open(&place.disk)
        .unwrap()
        .set_len(SECTOR)
        .unwrap();
    assert!(raw.read_at(LEN - SECTOR, &mut [0; 512]).is_err());
}

#[test]
fn a_forked_disk_is_shared_by_readers_and_written_by_nobody() {
    let place = place();
    let raw = Arc::new(open(&place, Access::ReadWrite).unwrap());
    let overlay = Overlay::create(&place.overlay, raw.clone()).unwrap();
    raw.freeze_as_base(&place.overlay).unwrap();
    assert!(raw.read_only());
    assert!(raw.write_at(0, &[9; 512]).is_err());
    let clone = Overlay::in_memory(Arc::new(open(&place, Access::ReadOnly).unwrap()));
    overlay.write_at(0, &[7; 512]).unwrap();
    assert_eq!(read(&clone, 0, SECTOR), [1; 512]);
    assert!(matches!(
        open(&place, Access::ReadWrite),
        Err(RawFileError::Locked { .. })
    ));
}

#[test]
fn a_forked_disk_stays_refused_after_its_process_is_gone_and_says_what_to_do() {
    let place = place();
    let raw = open(&place, Access::ReadWrite).unwrap();
    raw.freeze_as_base(&place.overlay).unwrap();
    drop(raw); // A killed process drops its locks and nothing else, as here.
    let error = open(&place, Access::ReadWrite).unwrap_err();
    assert!(matches!(&error, RawFileError::FrozenBase { overlays, .. }
        if *overlays == [place.overlay.clone()]));
    let message = error.to_string();
    assert!(
        message.contains(place.overlay.to_str().unwrap()),
        "{message}"
    );
    let command = format!("forkvm disk commit {}", place.disk.display());
    assert!(message.contains(&command), "{message}");
    open(&place, Access::ReadOnly).unwrap();
}

#[test]
fn a_disk_that_was_forked_through_a_symbolic_link_is_refused_under_its_own_name_too() {
    let place = place();
    let elsewhere = TempDir::new().unwrap();
    let link = elsewhere.path().join("link");
    std::os::unix::fs::symlink(&place.disk, &link).unwrap();
    let raw = RawFile::open(&link, Access::ReadWrite).unwrap();
    assert_eq!(raw.path(), place.disk);
    let raw = Arc::new(raw);
    drop(Overlay::create(&place.overlay, raw.clone()).unwrap());
    raw.freeze_as_base(&place.overlay).unwrap();
    drop(raw);
    for name in [&place.disk, &link] {
        let refused = RawFile::open(name, Access::ReadWrite);
        assert!(
            matches!(refused, Err(RawFileError::FrozenBase { .. })),
            "{name:?}"
        );
    }
    commit(&link, &mut |_, _| {}).unwrap();
    open(&place, Access::ReadWrite).unwrap();
}

#[test]
fn a_disk_with_two_names_is_not_written() {
    let place = place();
    let other = place.directory.path().join("other");
    fs::hard_link(&place.disk, &other).unwrap();
    for name in [&place.disk, &other] {
        let error = RawFile::open(name, Access::ReadWrite).unwrap_err();
        assert!(
            matches!(error, RawFileError::HardLinked { names: 2, .. }),
            "{error}"
        );
        RawFile::open(name, Access::ReadOnly).unwrap();
    }
    fs::remove_file(other).unwrap();
    open(&place, Access::ReadWrite).unwrap();
}

#[test]
fn a_fork_that_is_rolled_back_leaves_the_disk_as_it_was() {
    let place = place();
    let raw = open(&place, Access::ReadWrite).unwrap();
    raw.freeze_as_base(&place.overlay).unwrap();
    raw.unfreeze(&place.overlay).unwrap();
    raw.write_at(0, &[9; 512]).unwrap();
    assert!(
        open(&place, Access::ReadOnly).is_err(),
        "it is locked alone again"
    );
    drop(raw);
    open(&place, Access::ReadWrite).unwrap();
    assert_eq!(
        fs::read_dir(place.directory.path()).unwrap().count(),
        1,
        "no file is left"
    );
}

#[test]
fn a_base_that_somebody_reads_stays_frozen() {
    let place = place();
    let raw = open(&place, Access::ReadWrite).unwrap();
    raw.freeze_as_base(&place.overlay).unwrap();
    let reader = open(&place, Access::ReadOnly).unwrap();
    raw.unfreeze(&place.overlay).unwrap_err();
    assert!(raw.read_only());
    drop(reader);
    open(&place, Access::ReadOnly).unwrap();
    raw.unfreeze(&place.overlay).unwrap();
    assert!(!raw.read_only());
}

#[test]
fn a_second_fork_that_is_rolled_back_leaves_the_first_ones_overlay_in_the_mark() {
    let place = place();
    let second = place.directory.path().join("second");
    let raw = open(&place, Access::ReadWrite).unwrap();
    raw.freeze_as_base(&place.overlay).unwrap();
    raw.freeze_as_base(&second).unwrap();
    raw.unfreeze(&second).unwrap();
    assert!(raw.read_only());
    drop(raw);
    let error = open(&place, Access::ReadWrite).unwrap_err();
    assert!(matches!(&error, RawFileError::FrozenBase { overlays, .. }
        if *overlays == [place.overlay.clone()]));
}

#[test]
fn a_pipe_is_no_disk_and_nobody_waits_for_its_other_end() {
    let place = place();
    let pipe = place.directory.path().join("pipe");
    assert!(
        std::process::Command::new("mkfifo")
            .arg(&pipe)
            .status()
            .unwrap()
            .success()
    );
    let error = RawFile::open(&pipe, Access::ReadOnly).unwrap_err();
    assert!(matches!(error, RawFileError::NotAFile { .. }), "{error}");
}

#[test]
fn only_the_writer_of_a_disk_freezes_it() {
    let place = place();
    let reader = open(&place, Access::ReadOnly).unwrap();
    let refused = reader.freeze_as_base(&place.overlay);
    assert!(matches!(refused, Err(MarkError::NotWriter { .. })));
    assert!(!place.directory.path().join("disk.forkvm-base").exists());
}

#[test]
fn a_mark_that_cannot_be_read_keeps_the_disk_from_being_written() {
    let place = place();
    for content in [
        "",
        "{}",
        r#"{"version":9,"phase":"frozen","overlays":[],"frozen_at_unix_s":0}"#,
    ] {
        fs::write(place.directory.path().join("disk.forkvm-base"), content).unwrap();
        let error = open(&place, Access::ReadWrite).unwrap_err();
        assert!(
            matches!(error, RawFileError::Mark(MarkError::Damaged { .. })),
            "{error}"
        );
    }
}

#[test]
fn a_freeze_that_cannot_leave_its_mark_leaves_the_disk_as_it_was() {
    let place = place();
    let raw = open(&place, Access::ReadWrite).unwrap();
    // The mark is written under this name first.
    fs::create_dir(place.directory.path().join("disk.forkvm-base.new")).unwrap();
    raw.freeze_as_base(&place.overlay).unwrap_err();
    raw.write_at(0, &[9; 512]).unwrap();
    assert!(!place.directory.path().join("disk.forkvm-base").exists());
}

#[test]
fn an_overlay_keeps_what_was_flushed_and_what_was_written_before_it_was_closed() {
    let place = place();
    let base = numbered_base(place.directory.path());
    let overlay = Overlay::create(&place.overlay, base.clone()).unwrap();
    overlay.write_at(0, &[8; 512]).unwrap();
    overlay.flush().unwrap();
    overlay.discard(SECTOR..2 * SECTOR).unwrap();
    drop(overlay);
    let overlay = Overlay::open(&place.overlay, base).unwrap();
    assert_eq!(
        read(&overlay, 0, 3 * SECTOR),
        [[8; 512], [0; 512], [3; 512]].concat()
    );
}

#[test]
fn an_overlay_is_open_in_one_place_only() {
    let place = place();
    let base = numbered_base(place.directory.path());
    let _open = Overlay::create(&place.overlay, base.clone()).unwrap();
    assert!(matches!(
        Overlay::open(&place.overlay, base.clone()),
        Err(OverlayError::Locked { .. })
    ));
    assert!(matches!(
        Overlay::create(&place.overlay, base),
        Err(OverlayError::Locked { .. })
    ));
}

#[test]
fn an_overlay_that_holds_data_is_never_overwritten_an_empty_one_is() {
    let place = place();
    let base = numbered_base(place.directory.path());
    drop(Overlay::create(&place.overlay, base.clone()).unwrap());
    let overlay = Overlay::create(&place.overlay, base.clone()).unwrap();
    overlay.write_at(0, &[8; 512]).unwrap();
    drop(overlay);
    let refused = Overlay::create(&place.overlay, base.clone());
    assert!(matches!(refused, Err(OverlayError::Exists { .. })));
    fs::remove_file(place.directory.path().join("disk.overlay.map")).unwrap();
    let refused = Overlay::create(&place.overlay, base.clone());
    assert!(
        matches!(refused, Err(OverlayError::Exists { .. })),
        "its data may be worth something"
    );
    assert!(matches!(
        Overlay::open(&place.overlay, base),
        Err(OverlayError::Map(MapError::Missing { .. }))
    ));
}

#[test]
fn a_half_made_overlay_of_a_killed_process_is_in_nobodys_way() {
    let place = place();
    File::create(&place.overlay).unwrap().set_len(LEN).unwrap();
    Overlay::create(&place.overlay, numbered_base(place.directory.path())).unwrap();
}

#[test]
fn any_flipped_or_missing_byte_of_a_presence_map_is_noticed() {
    let place = place();
    let base = numbered_base(place.directory.path());
    let overlay = Overlay::create(&place.overlay, base.clone()).unwrap();
    overlay.write_at(3 * SECTOR, &[8; 512]).unwrap();
    drop(overlay);
    let map = place.directory.path().join("disk.overlay.map");
    let good = fs::read(&map).unwrap();
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 1;
        for bad in [bad, good[..at].to_vec()] {
            fs::write(&map, bad).unwrap();
            assert!(
                matches!(
                    Overlay::open(&place.overlay, base.clone()),
                    Err(OverlayError::Map(MapError::Damaged { .. }))
                ),
                "byte {at}"
            );
        }
    }
    fs::write(&map, good).unwrap();
    Overlay::open(&place.overlay, base).unwrap();
}

#[test]
fn an_overlay_of_another_disk_or_a_truncated_one_is_named() {
    let place = place();
    let base = numbered_base(place.directory.path());
    drop(Overlay::create(&place.overlay, base.clone()).unwrap());
    File::options()
        .write(true)
        .open(&place.overlay)
        .unwrap()
        .set_len(SECTOR)
        .unwrap();
    let error = Overlay::open(&place.overlay, base).err().unwrap();
    assert!(
        matches!(error, OverlayError::Size { len: SECTOR, .. }),
        "{error}"
    );
}

#[test]
fn an_overlay_that_was_removed_while_open_leaves_nothing_behind() {
    let place = place();
    let base = numbered_base(place.directory.path());
    let overlay = Overlay::create(&place.overlay, base).unwrap();
    overlay.write_at(0, &[8; 512]).unwrap();
    Overlay::remove_files(&place.overlay).unwrap();
    assert_eq!(read(&overlay, 0, SECTOR), [8; 512], "it goes on");
    drop(overlay);
    let names: Vec<_> = fs::read_dir(place.directory.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.contains("overlay"))
        .collect();
    assert_eq!(names, [""; 0]);
}

#[test]
fn a_disk_larger_than_4_gib_is_addressed_whole() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("large");
    let len = 6 << 30;
    let file = File::create(&path).unwrap();
    file.set_len(len).unwrap();
    file.write_all_at(&[1; 512], len - SECTOR).unwrap();
    let overlay = Overlay::in_memory(Arc::new(RawFile::open(&path, Access::ReadOnly).unwrap()));
    assert_eq!(read(&overlay, len - SECTOR, SECTOR), [1; 512]);
    overlay.write_at(len - SECTOR, &[2; 512]).unwrap();
    assert_eq!(read(&overlay, len - SECTOR, SECTOR), [2; 512]);
    assert_eq!(overlay.presence(0).unwrap().len, len - SECTOR);
}
