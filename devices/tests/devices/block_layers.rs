//! What every block layer promises, held against each of them.

use std::fs::File;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;

use forkvm_devices::block::{
    Access, BlockLayer, ForeignFile, Frozen, HeldError, Overlay, RawFile, SECTOR,
};
use tempfile::TempDir;

pub(crate) const LEN: u64 = 64 * SECTOR;

/// A raw disk whose every sector holds its own number.
pub(crate) fn numbered_disk(path: &Path) {
    let content: Vec<u8> = (0..LEN).map(|at| (at / SECTOR) as u8 + 1).collect();
    std::fs::write(path, content).unwrap();
}

pub(crate) fn numbered_base(directory: &Path) -> Arc<dyn BlockLayer> {
    let path = directory.join("base");
    if !path.exists() {
        numbered_disk(&path);
    }
    Arc::new(RawFile::open(path, Access::ReadOnly).unwrap())
}

pub(crate) fn read(layer: &dyn BlockLayer, offset: u64, len: u64) -> Vec<u8> {
    let mut data = vec![0xee; len as usize];
    layer.read_at(offset, &mut data).unwrap();
    data
}

/// One of every kind that can be written, all with the content of a numbered disk.
fn writable(directory: &Path) -> Vec<(&'static str, Arc<dyn BlockLayer>)> {
    numbered_disk(&directory.join("raw"));
    let raw = RawFile::open(directory.join("raw"), Access::ReadWrite).unwrap();
    let base = numbered_base(directory);
    let file = Overlay::create(directory.join("overlay"), base.clone()).unwrap();
    let middle: Arc<dyn BlockLayer> = Arc::new(Overlay::in_memory(base.clone()));
    let held = Overlay::in_memory(base.clone()).held().unwrap();
    let handed_over = Overlay::from_held(held, None, base.clone()).unwrap();
    vec![
        ("overlay that was handed over", Arc::new(handed_over)),
        ("raw file", Arc::new(raw)),
        ("overlay in memory", Arc::new(Overlay::in_memory(base))),
        ("overlay in a file", Arc::new(file)),
        (
            "overlay on an overlay",
            Arc::new(Overlay::in_memory(Arc::new(Frozen::new(middle)))),
        ),
    ]
}

/// The numbered base, as another process opened it.
fn foreign(directory: &Path) -> Arc<dyn BlockLayer> {
    let path = directory.join("base");
    let file = File::open(&path).unwrap();
    Arc::new(ForeignFile::new(file, path, LEN).unwrap())
}

fn read_only(directory: &Path) -> Vec<(&'static str, Arc<dyn BlockLayer>)> {
    let base = numbered_base(directory);
    vec![
        ("raw file, read-only", base.clone()),
        ("file of another process", foreign(directory)),
        ("frozen", Arc::new(Frozen::new(base))),
    ]
}

fn every(directory: &Path) -> Vec<(&'static str, Arc<dyn BlockLayer>)> {
    [writable(directory), read_only(directory)].concat()
}

#[test]
fn a_disk_has_a_length_and_content() {
    let directory = TempDir::new().unwrap();
    for (name, layer) in every(directory.path()) {
        assert_eq!(layer.len(), LEN, "{name}");
        assert!(!layer.is_empty());
        assert_eq!(read(&*layer, 3 * SECTOR, SECTOR), [4; 512], "{name}");
        assert!(
            read(&*layer, LEN, 0).is_empty(),
            "{name}: nothing, at the end"
        );
    }
}

#[test]
fn what_is_written_is_read_and_its_neighbours_stay() {
    let directory = TempDir::new().unwrap();
    for (name, layer) in writable(directory.path()) {
        assert!(!layer.read_only());
        layer.write_at(2 * SECTOR, &[0xaa; 1024]).unwrap();
        let firsts: Vec<u8> = read(&*layer, SECTOR, 4 * SECTOR)
            .chunks(512)
            .map(|sector| sector[0])
            .collect();
        assert_eq!(firsts, [2, 0xaa, 0xaa, 5], "{name}");
        layer.flush().unwrap();
        assert_eq!(read(&*layer, 2 * SECTOR, 1024), [0xaa; 1024], "{name}");
    }
}

#[test]
fn what_is_discarded_reads_as_zero_and_can_be_written_again() {
    let directory = TempDir::new().unwrap();
    for (name, layer) in writable(directory.path()) {
        layer.discard(SECTOR..3 * SECTOR).unwrap();
        let firsts: Vec<u8> = read(&*layer, 0, 4 * SECTOR)
            .chunks(512)
            .map(|sector| sector[511])
            .collect();
        assert_eq!(firsts, [1, 0, 0, 4], "{name}");
        assert_eq!(layer.len(), LEN, "{name}");
        layer.write_at(SECTOR, &[7; 512]).unwrap();
        assert_eq!(read(&*layer, SECTOR, SECTOR), [7; 512], "{name}");
        layer.discard(0..LEN).unwrap();
        assert_eq!(read(&*layer, 0, LEN), vec![0; LEN as usize], "{name}");
    }
}

#[test]
fn what_is_not_whole_sectors_of_the_disk_is_refused_and_changes_nothing() {
    let directory = TempDir::new().unwrap();
    let bad = [
        (1, 512),
        (0, 511),
        (LEN, 512),
        (LEN - 512, 1024),
        (u64::MAX - 511, 512),
    ];
    for (name, layer) in writable(directory.path()) {
        let before = read(&*layer, 0, LEN);
        for (offset, len) in bad {
            let mut data = vec![9; len];
            let kinds = [
                layer.read_at(offset, &mut data).unwrap_err().kind(),
                layer.write_at(offset, &data).unwrap_err().kind(),
                layer
                    .discard(offset..offset.saturating_add(len as u64))
                    .unwrap_err()
                    .kind(),
            ];
            assert_eq!(
                kinds,
                [ErrorKind::InvalidInput; 3],
                "{name}: {len} at {offset}"
            );
        }
        assert!(layer.presence(LEN).is_err());
        assert_eq!(read(&*layer, 0, LEN), before, "{name}");
    }
}

#[test]
fn a_read_only_layer_refuses_every_change() {
    let directory = TempDir::new().unwrap();
    for (name, layer) in read_only(directory.path()) {
        assert!(layer.read_only());
        let write = layer.write_at(0, &[9; 512]).unwrap_err().kind();
        let discard = layer.discard(0..512).unwrap_err().kind();
        assert_eq!(
            [write, discard],
            [ErrorKind::ReadOnlyFilesystem; 2],
            "{name}"
        );
        layer.flush().unwrap();
        assert_eq!(read(&*layer, 0, SECTOR), [1; 512], "{name}");
    }
}

#[test]
fn presence_runs_cover_the_disk() {
    let directory = TempDir::new().unwrap();
    for (name, layer) in every(directory.path()) {
        let mut at = 0;
        while at < LEN {
            let presence = layer.presence(at).unwrap();
            assert!(
                presence.len >= SECTOR && presence.len.is_multiple_of(SECTOR),
                "{name}"
            );
            at += presence.len;
        }
        assert_eq!(at, LEN, "{name}");
    }
}

#[test]
fn an_overlay_says_which_sectors_it_holds() {
    let directory = TempDir::new().unwrap();
    let overlay = Overlay::in_memory(numbered_base(directory.path()));
    overlay.write_at(2 * SECTOR, &[1; 1024]).unwrap();
    overlay.discard(4 * SECTOR..5 * SECTOR).unwrap();
    let at = |sector| {
        let presence = overlay.presence(sector * SECTOR).unwrap();
        (presence.present, presence.len / SECTOR)
    };
    assert_eq!(at(0), (false, 2));
    assert_eq!(at(2), (true, 3), "what is discarded is held, too: as zero");
    assert_eq!(at(4), (true, 1));
    assert_eq!(at(5), (false, 59));
    assert_eq!(overlay.present_bytes(), 3 * SECTOR);
}

#[test]
fn readers_of_a_shared_base_do_not_disturb_each_other() {
    let directory = TempDir::new().unwrap();
    let base: Arc<dyn BlockLayer> = Arc::new(Overlay::in_memory(numbered_base(directory.path())));
    base.write_at(0, &[0x99; 512]).unwrap();
    std::thread::scope(|scope| {
        for clone in 0..4u8 {
            let base = base.clone();
            scope.spawn(move || {
                let own = Overlay::in_memory(Arc::new(Frozen::new(base)));
                for _ in 0..50 {
                    own.write_at(SECTOR, &[clone; 512]).unwrap();
                    assert_eq!(read(&own, 0, SECTOR), [0x99; 512]);
                    assert_eq!(read(&own, SECTOR, SECTOR), [clone; 512]);
                }
            });
        }
    });
    assert_eq!(read(&*base, SECTOR, SECTOR), [2; 512]);
}

#[test]
fn space_is_given_back_by_a_discard() {
    use std::os::unix::fs::MetadataExt;
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("raw");
    std::fs::write(&path, vec![1; 1 << 20]).unwrap();
    let raw = RawFile::open(&path, Access::ReadWrite).unwrap();
    raw.flush().unwrap();
    let before = File::open(&path).unwrap().metadata().unwrap().blocks();
    raw.discard(0..1 << 20).unwrap();
    let after = File::open(&path).unwrap().metadata().unwrap().blocks();
    assert!(after < before, "{before} blocks before, {after} after");
}

#[test]
fn zeroes_written_to_a_raw_file_keep_its_space_reserved() {
    use std::os::unix::fs::MetadataExt;
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("raw");
    std::fs::write(&path, vec![1; 1 << 20]).unwrap();
    let raw = RawFile::open(&path, Access::ReadWrite).unwrap();
    raw.write_zeroes(SECTOR..1 << 20).unwrap();
    raw.flush().unwrap();
    let blocks = File::open(&path).unwrap().metadata().unwrap().blocks();
    assert!(blocks * 512 >= 1 << 20, "{blocks} blocks");
    let expected = [
        vec![1; SECTOR as usize],
        vec![0; (1 << 20) - SECTOR as usize],
    ]
    .concat();
    assert!(read(&raw, 0, 1 << 20) == expected);
}

#[test]
fn sectors_that_are_handed_over_are_those_that_were_held() {
    let directory = TempDir::new().unwrap();
    let base = numbered_base(directory.path());
    let overlay = Overlay::in_memory(base.clone());
    overlay.write_at(2 * SECTOR, &[0xaa; 1024]).unwrap();
    overlay.discard(8 * SECTOR..9 * SECTOR).unwrap();
    let held = overlay.held().unwrap();
    let handed_over = Overlay::from_held(held, None, foreign(directory.path())).unwrap();
    assert_eq!(read(&handed_over, 0, LEN), read(&overlay, 0, LEN));
    assert_eq!(handed_over.present_bytes(), overlay.present_bytes());
}

#[test]
fn sectors_that_cannot_be_those_that_were_held_are_refused() {
    let directory = TempDir::new().unwrap();
    let base = numbered_base(directory.path());
    let overlay = Overlay::in_memory(base.clone());
    overlay.write_at(0, &[1; 512]).unwrap();
    let take = |change: &dyn Fn(&mut forkvm_devices::block::HeldSectors)| {
        let mut held = overlay.held().unwrap();
        change(&mut held);
        Overlay::from_held(held, None, base.clone()).map(|_| ())
    };
    take(&|_| ()).unwrap();
    let refused = take(&|held| held.map[30] ^= 1);
    assert!(matches!(refused, Err(HeldError::Map(_))), "{refused:?}");
    let refused = take(&|held| held.data = None);
    assert!(matches!(refused, Err(HeldError::NoData)), "{refused:?}");
    let short = File::create(directory.path().join("short")).unwrap();
    let refused = take(&|held| held.data = Some(short.try_clone().unwrap()));
    assert!(
        matches!(refused, Err(HeldError::Size { .. })),
        "{refused:?}"
    );
}

#[test]
fn a_disk_is_free_when_its_owner_drops_it_whoever_has_its_descriptor() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("disk");
    numbered_disk(&path);
    let disk = RawFile::open(&path, Access::ReadWrite).unwrap();
    let forkvm_devices::block::Storage::Raw { file, .. } = disk.storage() else {
        panic!("a raw file is one");
    };
    let elsewhere = file.try_clone().unwrap();
    RawFile::open(&path, Access::ReadOnly).unwrap_err();
    drop(disk);
    RawFile::open(&path, Access::ReadWrite).unwrap();
    drop(elsewhere);
}
