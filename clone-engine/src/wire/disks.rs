//! What the disks of a clone hold when it has ended, on its way from the worker to the engine: the overlays
//! over what the clone came from, one and one more for each fork that found it written. Their maps go in
//! one memfd, their data as the files that they are in.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::ptr;
use std::sync::Arc;

use forkvm_devices::block::{BlockLayer, Frozen, HeldSectors, Overlay, Storage};
use forkvm_vmm::memory;
use serde::{Deserialize, Serialize};

/// Most bytes of all maps: far beyond those of the largest disks.
const MOST_BYTES: u64 = 1 << 30;

/// What an overlay holds beyond its base.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct HeldOverlay {
    /// Bytes of its map.
    map_len: u64,
    /// Whether a data file comes along.
    has_data: bool,
}

/// Of `disks`, each of which stands on the layer of `below` at its place: their overlays from the bottom up,
/// and the files that go with them. None for a disk that the guest could not write to.
pub(crate) fn hand_over(
    below: &[Arc<dyn BlockLayer>],
    disks: &[Arc<dyn BlockLayer>],
) -> io::Result<(Vec<Vec<HeldOverlay>>, Vec<File>)> {
    let (mut maps, mut data) = (Vec::new(), Vec::new());
    let mut all = Vec::new();
    for (below, disk) in below.iter().zip(disks) {
        let mut overlays = Vec::new();
        for held in overlays_between(below, disk)? {
            overlays.push(HeldOverlay {
                map_len: held.map.len() as u64,
                has_data: held.data.is_some(),
            });
            maps.extend(held.map);
            data.extend(held.data);
        }
        all.push(overlays);
    }
    if maps.is_empty() {
        return Ok((all, data));
    }
    let file = memory::memfd(c"forkvm-maps", maps.len() as u64).map_err(io::Error::other)?;
    file.write_all_at(&maps, 0)?;
    data.insert(0, file);
    Ok((all, data))
}

/// What the overlays of `disk` over `below` hold, from the bottom up.
fn overlays_between(
    below: &Arc<dyn BlockLayer>,
    disk: &Arc<dyn BlockLayer>,
) -> io::Result<Vec<HeldSectors>> {
    let mut held = Vec::new();
    let mut layer = disk;
    while !ptr::addr_eq(Arc::as_ptr(layer), Arc::as_ptr(below)) {
        let Storage::Overlay { overlay, base, .. } = layer.storage() else {
            return Err(io::Error::other(
                "a disk does not stand on what it came from",
            ));
        };
        held.push(overlay.held()?);
        layer = base;
    }
    held.reverse();
    Ok(held)
}

/// The disks that were handed over, on the same layers here.
pub(crate) fn take_over(
    below: &[Arc<dyn BlockLayer>],
    held: &[Vec<HeldOverlay>],
    files: Vec<OwnedFd>,
) -> io::Result<Vec<Arc<dyn BlockLayer>>> {
    let mut files = files.into_iter().map(File::from);
    let maps = match held.iter().any(|overlays| !overlays.is_empty()) {
        true => Some(files.next().ok_or_else(missing)?),
        false => None,
    };
    let maps_len = match &maps {
        Some(maps) => maps.metadata()?.len().min(MOST_BYTES),
        None => 0,
    };
    let mut at = 0;
    let mut stack = |below: Arc<dyn BlockLayer>, held: &HeldOverlay| -> io::Result<Overlay> {
        let maps = maps.as_ref().ok_or_else(missing)?;
        if held.map_len > maps_len - at {
            return Err(missing());
        }
        let mut map = vec![0; held.map_len as usize];
        maps.read_exact_at(&mut map, at)?;
        at += held.map_len;
        let data = match held.has_data {
            true => Some(files.next().ok_or_else(missing)?),
            false => None,
        };
        let held = HeldSectors { map, data };
        Overlay::from_held(held, None, below).map_err(io::Error::other)
    };
    let mut take = |(below, held): (&Arc<dyn BlockLayer>, &Vec<HeldOverlay>)| {
        let mut layer = below.clone();
        let Some((top, frozen)) = held.split_last() else {
            return Ok(layer);
        };
        for held in frozen {
            layer = Arc::new(Frozen::new(Arc::new(stack(layer, held)?)));
        }
        let top: Arc<dyn BlockLayer> = Arc::new(stack(layer, top)?);
        Ok(top)
    };
    below.iter().zip(held).map(&mut take).collect()
}

fn missing() -> io::Error {
    io::Error::other("the worker sent other files than it named")
}

#[cfg(test)]
mod tests {
    use std::slice::from_ref;

    use forkvm_devices::block::{Access, RawFile};

    use super::*;

    const SECTOR: usize = 512;
    const LEN: usize = 64 * SECTOR;

    fn base(folder: &tempfile::TempDir) -> Arc<dyn BlockLayer> {
        let path = folder.path().join("base.raw");
        std::fs::write(&path, vec![1; LEN]).unwrap();
        Arc::new(RawFile::open(&path, Access::ReadOnly).unwrap())
    }

    fn over(base: &Arc<dyn BlockLayer>, writes: &[(usize, u8)]) -> Arc<dyn BlockLayer> {
        let overlay = Overlay::in_memory(base.clone());
        for &(sector, value) in writes {
            let bytes = [value; SECTOR];
            overlay.write_at((sector * SECTOR) as u64, &bytes).unwrap();
        }
        Arc::new(overlay)
    }

    fn content(disk: &Arc<dyn BlockLayer>) -> Vec<u8> {
        let mut bytes = vec![0; LEN];
        disk.read_at(0, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn a_disk_that_was_forked_and_written_again_arrives_with_all_its_layers() {
        let folder = tempfile::tempdir().unwrap();
        let base = base(&folder);
        let before_the_forks = over(&base, &[(1, 11), (2, 12), (3, 13)]);
        let mut disk = before_the_forks;
        for (sector, value) in [(2, 22), (3, 33)] {
            let frozen: Arc<dyn BlockLayer> = Arc::new(Frozen::new(disk));
            disk = over(&frozen, &[(sector, value)]);
        }
        let untouched = over(&base, &[]);
        let below = [base.clone(), base.clone(), base.clone()];
        let disks = [disk.clone(), base.clone(), untouched];
        let (held, files) = hand_over(&below, &disks).unwrap();
        assert_eq!(held.iter().map(Vec::len).collect::<Vec<_>>(), [3, 0, 1]);
        let files = files.into_iter().map(OwnedFd::from).collect();
        let taken = take_over(&below, &held, files).unwrap();
        assert_eq!(content(&taken[0]), content(&disk));
        assert_eq!(content(&taken[0])[2 * SECTOR], 22);
        assert_eq!(content(&taken[1]), content(&base));
        assert_eq!(content(&taken[2]), content(&base));
    }

    #[test]
    fn a_disk_on_other_layers_than_it_came_from_is_no_end_without_a_reason() {
        let folder = tempfile::tempdir().unwrap();
        let (base, other) = (base(&folder), base(&folder));
        let disk = over(&base, &[(1, 11)]);
        let disk = from_ref(&disk);
        assert!(hand_over(&[other], disk).is_err());
        let (held, files) = hand_over(from_ref(&base), disk).unwrap();
        let files: Vec<OwnedFd> = files.into_iter().take(1).map(OwnedFd::from).collect();
        assert!(take_over(&[base], &held, files).is_err());
    }
}
