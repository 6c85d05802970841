//! What a fork, and a fork that fails, makes of disks; without a VM around them.

use std::fs::{self, File};
use std::sync::Mutex;

use forkvm_devices::block::{Access, RawFileError, SECTOR, commit};
use forkvm_devices::virtio::{Blk, MmioTransport};
use forkvm_devices::{Brake, GuestMemory, InterruptLine};
use tempfile::TempDir;
use vm_memory::GuestAddress;

use super::*;

struct NoLine;

impl InterruptLine for NoLine {
    fn pulse(&self) -> io::Result<()> {
        Ok(())
    }
}

/// A VM as far as its one disk goes.
struct Parent {
    device: Disk,
    sources: Vec<DiskSource>,
}

impl Parent {
    fn new(source: DiskSource) -> Parent {
        let ram = GuestMemory::from_ranges(&[(GuestAddress(0), 4096)]).unwrap();
        let blk = Blk::new(source.layer(), "disk");
        let device = MmioTransport::new("blk".into(), blk, ram, Arc::new(NoLine), Brake::default());
        Parent {
            device: Arc::new(Mutex::new(device)),
            sources: vec![source],
        }
    }

    /// The layer that its device writes to.
    fn layer(&self) -> Arc<dyn BlockLayer> {
        self.device.lock().unwrap().model().layer().clone()
    }

    /// Freezes the disk in a fork that succeeds.
    fn fork(&mut self) -> Result<DisksAtFork, DisksError> {
        let device = [self.device.clone()];
        FrozenDisks::freeze(&device, &mut self.sources).map(FrozenDisks::keep)
    }

    /// Freezes it in a fork that fails afterwards; `meanwhile` comes before the failure.
    fn fork_in_vain(&mut self, meanwhile: impl FnOnce()) {
        let device = [self.device.clone()];
        let frozen = FrozenDisks::freeze(&device, &mut self.sources).unwrap();
        meanwhile();
        drop(frozen);
    }

    /// Writes `byte` to sector `at`, as the guest.
    fn write(&self, at: u64, byte: u8) {
        self.layer()
            .write_at(at * SECTOR, &[byte; SECTOR as usize])
            .unwrap();
    }

    fn read(&self, at: u64) -> u8 {
        read(&self.layer(), at)
    }
}

/// First byte of sector `at`.
fn read(layer: &Arc<dyn BlockLayer>, at: u64) -> u8 {
    let mut sector = [0; SECTOR as usize];
    layer.read_at(at * SECTOR, &mut sector).unwrap();
    sector[0]
}

fn raw_disk() -> (TempDir, PathBuf) {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("disk");
    File::create(&path).unwrap().set_len(64 * SECTOR).unwrap();
    (folder, path)
}

fn raw(path: &Path) -> DiskSource {
    DiskSource::Raw(Arc::new(RawFile::open(path, Access::ReadWrite).unwrap()))
}

/// A parent on an overlay in memory and one on a raw file, which is forked already.
fn parents(folder: &Path) -> [Parent; 2] {
    let [read, written] = ["read", "written"].map(|name| folder.join(name));
    for path in [&read, &written] {
        File::create(path).unwrap().set_len(64 * SECTOR).unwrap();
    }
    let base = Arc::new(RawFile::open(read, Access::ReadOnly).unwrap());
    let mut on_file = Parent::new(raw(&written));
    drop(on_file.fork().unwrap());
    [Parent::new(DiskSource::volatile(base)), on_file]
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort_unstable();
    names
}

#[test]
fn a_disk_that_is_not_written_gets_no_deeper_however_often_it_is_forked() {
    let folder = TempDir::new().unwrap();
    for mut parent in parents(folder.path()) {
        let files = names(folder.path());
        for _ in 0..200 {
            let clone = parent.fork().unwrap().for_clone().remove(0);
            assert_eq!((parent.layer().depth(), clone.layer().depth()), (2, 2));
        }
        assert_eq!(names(folder.path()), files, "no file was made either");
    }
}

#[test]
fn vms_of_a_fork_that_did_not_stack_do_not_see_each_others_writes() {
    let folder = TempDir::new().unwrap();
    for mut parent in parents(folder.path()) {
        let fork = parent.fork().unwrap();
        let clone = fork.for_clone().remove(0).layer();
        parent.write(0, 1);
        clone.write_at(0, &[2; SECTOR as usize]).unwrap();
        let later = fork.for_clone().remove(0).layer();
        assert_eq!(
            (parent.read(0), read(&clone, 0), read(&later, 0)),
            (1, 2, 0)
        );
    }
}

#[test]
fn a_disk_that_is_written_between_forks_has_at_most_64_layers_and_stays_usable() {
    let folder = TempDir::new().unwrap();
    for mut parent in parents(folder.path()) {
        let mut forks = Vec::new();
        let error = loop {
            let number = forks.len() as u8 + 1;
            parent.write(0, number);
            parent.write(u64::from(number) % 64, number);
            match parent.fork() {
                Ok(fork) => forks.push(fork),
                Err(error) => break error,
            }
        };
        assert!(matches!(error, DisksError::TooDeep { most: 64 }), "{error}");
        assert_eq!((parent.layer().depth(), forks.len()), (64, 62));
        assert_eq!(parent.read(0), 63);
        parent.write(0, 99);
        for (index, fork) in forks.iter().enumerate() {
            assert_eq!(read(&fork.for_clone()[0].layer(), 0), index as u8 + 1);
        }
    }
}

#[test]
fn a_fork_that_fails_puts_a_raw_disk_back() {
    let (folder, path) = raw_disk();
    let mut parent = Parent::new(raw(&path));
    parent.write(0, 1);
    parent.fork_in_vain(|| {});
    assert!(matches!(parent.sources[0], DiskSource::Raw(_)));
    parent.write(1, 2);
    assert_eq!((parent.read(0), parent.layer().depth()), (1, 1));
    assert_eq!(names(folder.path()), ["disk"]);
}

#[test]
fn a_fork_that_fails_leaves_the_overlays_of_earlier_forks() {
    let (folder, path) = raw_disk();
    let mut parent = Parent::new(raw(&path));
    drop(parent.fork().unwrap());
    let files = names(folder.path());
    // First one that does not stack, then one that does.
    for byte in [1, 2] {
        parent.fork_in_vain(|| {});
        assert_eq!(names(folder.path()), files);
        parent.write(0, byte);
        assert_eq!((parent.read(0), parent.layer().depth()), (byte, 2));
    }
    drop(parent);
    commit(&path, &mut |_, _| {}).unwrap();
    assert_eq!(fs::read(&path).unwrap()[0], 2);
}

#[test]
fn a_parent_whose_file_somebody_opened_during_a_fork_that_failed_goes_on_in_the_overlay() {
    let (folder, path) = raw_disk();
    let mut parent = Parent::new(raw(&path));
    parent.write(0, 1);
    let mut reader = None;
    parent.fork_in_vain(|| reader = Some(RawFile::open(&path, Access::ReadOnly).unwrap()));

    parent.write(1, 2);
    assert_eq!((parent.read(0), parent.read(1)), (1, 2));
    assert!(
        Arc::ptr_eq(&parent.sources[0].layer(), &parent.layer()),
        "the list says what the device works on"
    );
    let clone = parent.fork().unwrap().for_clone().remove(0);
    assert_eq!((read(&clone.layer(), 0), read(&clone.layer(), 1)), (1, 2));
    drop((parent, clone, reader));
    let refused = RawFile::open(&path, Access::ReadWrite);
    assert!(matches!(refused, Err(RawFileError::FrozenBase { .. })));
    commit(&path, &mut |_, _| {}).unwrap();
    assert_eq!(fs::read(&path).unwrap()[SECTOR as usize], 2);
    assert_eq!(names(folder.path()), ["disk"]);
}

#[test]
fn an_empty_overlay_of_a_process_that_was_killed_in_a_fork_is_used_again() {
    let (folder, path) = raw_disk();
    let orphan = folder.path().join("disk.overlay-1");
    let base = raw(&path).layer();
    drop(Overlay::create(&orphan, base).unwrap());
    let mut parent = Parent::new(raw(&path));
    drop(parent.fork().unwrap());
    let expected = [
        "disk",
        "disk.forkvm-base",
        "disk.overlay-1",
        "disk.overlay-1.map",
    ];
    assert_eq!(names(folder.path()), expected);
}

#[test]
fn an_overlay_that_holds_data_or_that_a_mark_names_is_left_alone() {
    let (folder, path) = raw_disk();
    let base = raw(&path).layer();
    let kept = Overlay::create(folder.path().join("disk.overlay-1"), base).unwrap();
    kept.write_at(0, &[7; SECTOR as usize]).unwrap();
    drop(kept);
    fs::create_dir(folder.path().join("disk.overlay-2")).unwrap();
    let mut parent = Parent::new(raw(&path));
    drop(parent.fork().unwrap());
    parent.write(0, 1);
    // Empty and closed, as that of a saved machine.
    let named = folder.path().join("disk.overlay-4");
    let DiskSource::Durable { base, .. } = &parent.sources[0] else {
        panic!("a forked raw disk")
    };
    drop(Overlay::create(&named, base.clone()).unwrap());
    base.freeze_as_base(&named).unwrap();
    drop(parent.fork().unwrap());
    let DiskSource::Durable { top, .. } = &parent.sources[0] else {
        panic!("a forked raw disk")
    };
    assert_eq!(top.path().unwrap(), folder.path().join("disk.overlay-5"));
}
