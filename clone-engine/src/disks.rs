//! Disks of a VM, and what a fork makes of them.
//!
//! A fork freezes every disk at its instant: what was the topmost layer becomes the read-only base
//! of all, the parent goes on in a fresh overlay over it, and so does each clone. A read-only disk
//! is simply shared, and an overlay that nothing was written to is not stacked upon. A disk has at
//! most [`MOST_LAYERS`] layers: each read may have to ask all of them.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};

use forkvm_devices::block::{
    BlockLayer, Frozen, MarkError, Overlay, OverlayError, Presence, RawFile, Storage,
};
use forkvm_vmm::Disk;
use thiserror::Error;

#[cfg(test)]
mod tests;

/// Most layers of a disk, from the raw file to the overlay that a VM writes to.
const MOST_LAYERS: u32 = 64;

/// Where a disk of a VM is kept.
#[derive(Clone)]
pub enum DiskSource {
    /// A disk that the guest may not write to.
    ReadOnly(Arc<dyn BlockLayer>),
    /// A raw file, open for writing. The first fork turns it into a frozen base, with a mark beside
    /// it that says so, and the parent goes on in an overlay file beside it; `disk commit` merges
    /// that later.
    Raw(Arc<RawFile>),
    /// A writable layer whose content ends with the VM.
    Volatile(Arc<dyn BlockLayer>),
    /// Overlay files over a raw file that an earlier fork has frozen; the last one is the top.
    Durable {
        /// The frozen file.
        base: Arc<RawFile>,
        /// The overlay that the VM writes to.
        top: Arc<Overlay>,
    },
}

impl DiskSource {
    /// A writable disk over `base` that leaves it as it is; what is written ends with the VM.
    pub fn volatile(base: Arc<dyn BlockLayer>) -> DiskSource {
        DiskSource::Volatile(Arc::new(Overlay::in_memory(base)))
    }

    /// The layer that the VM's device works on.
    pub fn layer(&self) -> Arc<dyn BlockLayer> {
        match self {
            DiskSource::ReadOnly(layer) | DiskSource::Volatile(layer) => layer.clone(),
            DiskSource::Raw(file) => file.clone(),
            DiskSource::Durable { top, .. } => top.clone(),
        }
    }

    /// Whether the guest may not write to it.
    pub fn read_only(&self) -> bool {
        matches!(self, DiskSource::ReadOnly(_))
    }

    /// Makes what was written so far durable, where it outlives the VM. Called before a fork's pause,
    /// so that the same within the pause finds little to do, and at the end of the VM.
    pub(crate) fn flush(&self) -> Result<(), DisksError> {
        let (disk, flushed) = match self {
            DiskSource::ReadOnly(_) | DiskSource::Volatile(_) => return Ok(()),
            DiskSource::Raw(file) => (file, file.flush()),
            DiskSource::Durable { base, top } => (base, top.flush()),
        };
        flushed.map_err(|source| DisksError::Flush {
            disk: disk.path().into(),
            source,
        })
    }

    /// The layer below, if this disk is written to an overlay that holds nothing yet.
    fn below_untouched(&self) -> Option<Arc<dyn BlockLayer>> {
        let layer = match self {
            DiskSource::Volatile(layer) => layer.as_ref(),
            DiskSource::Durable { top, .. } => top.as_ref() as &dyn BlockLayer,
            DiskSource::ReadOnly(_) | DiskSource::Raw(_) => return None,
        };
        let Storage::Overlay { base, .. } = layer.storage() else {
            return None;
        };
        let untouched = Presence {
            present: false,
            len: layer.len(),
        };
        layer
            .presence(0)
            .is_ok_and(|run| run == untouched)
            .then(|| base.clone())
    }

    fn freeze(&self) -> Result<Freeze, DisksError> {
        let same = |frozen| Freeze {
            after: self.clone(),
            frozen,
            overlay: None,
            failed: None,
        };
        if let Some(base) = self.below_untouched() {
            // The base is immutable already, so the parent keeps its empty overlay over it: a disk
            // gets deeper only by a fork that found it written.
            return Ok(same(base));
        }
        Ok(match self {
            DiskSource::ReadOnly(layer) => same(layer.clone()),
            DiskSource::Volatile(layer) => {
                let frozen = frozen(layer.clone())?;
                Freeze {
                    after: DiskSource::volatile(frozen.clone()),
                    ..same(frozen)
                }
            }
            DiskSource::Raw(file) => DiskSource::stack(file, frozen(file.clone())?)?,
            DiskSource::Durable { base, top } => {
                let frozen = frozen(top.clone())?;
                // What the mark says must be on disk: the overlay that is left behind is final.
                self.flush()?;
                DiskSource::stack(base, frozen)?
            }
        })
    }

    /// One more overlay file for the raw `file`, over its present content `below`.
    fn stack(file: &Arc<RawFile>, below: Arc<dyn BlockLayer>) -> Result<Freeze, DisksError> {
        let (path, top) = new_overlay(file, &below)?;
        let failed = file.freeze_as_base(&path).err().map(DisksError::from);
        let after = DiskSource::Durable {
            base: file.clone(),
            top: Arc::new(top),
        };
        Ok(Freeze {
            after,
            frozen: below,
            overlay: Some(path),
            failed,
        })
    }

    /// Makes this disk, that was frozen over the new file `overlay`, writable again. On an error it
    /// is not: the parent has to go on in that overlay.
    fn thaw(&self, overlay: &Path) -> Result<(), DisksError> {
        match self {
            DiskSource::Raw(file) => file.unfreeze(overlay)?,
            DiskSource::Durable { base, .. } => {
                if let Err(error) = base.unfreeze(overlay) {
                    // It names an overlay without content, which has to be there then.
                    tracing::warn!(%error, "the mark of a disk keeps the overlay of a fork that failed");
                    return Ok(());
                }
            }
            DiskSource::ReadOnly(_) | DiskSource::Volatile(_) => return Ok(()),
        }
        if let Err(leftover) = Overlay::remove_files(overlay) {
            tracing::warn!(%leftover, "the overlay of a fork that failed could not be removed");
        }
        Ok(())
    }
}

/// What the freeze of a disk comes to.
struct Freeze {
    /// What the parent goes on with.
    after: DiskSource,
    /// What is immutable now.
    frozen: Arc<dyn BlockLayer>,
    /// The file that was made for it.
    overlay: Option<PathBuf>,
    /// The disk may be frozen, but not as it should be: to be undone.
    failed: Option<DisksError>,
}

/// `layer`, if there is room for an overlay over it.
fn frozen(layer: Arc<dyn BlockLayer>) -> Result<Arc<dyn BlockLayer>, DisksError> {
    if layer.depth() >= MOST_LAYERS {
        return Err(DisksError::TooDeep { most: MOST_LAYERS });
    }
    Ok(Arc::new(Frozen::new(layer)))
}

/// An empty overlay file over `below`, `DISK.overlay-1` or the first number that is free. What a
/// process that was killed in a fork left there without content is free.
fn new_overlay(
    disk: &RawFile,
    below: &Arc<dyn BlockLayer>,
) -> Result<(PathBuf, Overlay), DisksError> {
    // One of these may be empty and not open, and a saved machine count on it all the same.
    let named = disk.named_overlays()?;
    let attempt = |number: u32| {
        let mut path = disk.path().as_os_str().to_owned();
        path.push(format!(".overlay-{number}"));
        let path = PathBuf::from(path);
        if named.contains(&path) {
            return None;
        }
        match Overlay::create(&path, below.clone()) {
            Ok(overlay) => Some(Ok((path, overlay))),
            Err(OverlayError::Exists { .. } | OverlayError::Locked { .. }) => None,
            Err(OverlayError::Io { source, .. }) if is_foreign(&source) && path.exists() => None,
            Err(error) => Some(Err(error.into())),
        }
    };
    (1..).find_map(attempt).expect("some number is free")
}

/// Whether a file could not be opened because of what it is or whose.
fn is_foreign(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::PermissionDenied | io::ErrorKind::IsADirectory
    )
}

/// The disks of a paused VM, frozen, and what the VM goes on with in their place in its list.
/// Dropped without [`FrozenDisks::keep`], it puts all back, device and list alike; a disk that
/// cannot be written as before stays on its overlay in both.
pub(crate) struct FrozenDisks<'a> {
    sources: &'a mut [DiskSource],
    /// One for each disk that is frozen, from the first on.
    undo: Vec<Undo>,
    frozen: Vec<DiskAtFork>,
}

struct Undo {
    device: Disk,
    before: DiskSource,
    overlay: Option<PathBuf>,
}

/// What a clone's disks are made from.
pub(crate) struct DisksAtFork(Vec<DiskAtFork>);

struct DiskAtFork {
    content: Arc<dyn BlockLayer>,
    read_only: bool,
}

impl<'a> FrozenDisks<'a> {
    /// Freezes the disks that `devices` work on; `sources` are what they are, in the same order.
    pub(crate) fn freeze(
        devices: &[Disk],
        sources: &'a mut [DiskSource],
    ) -> Result<FrozenDisks<'a>, DisksError> {
        let mut disks = FrozenDisks {
            sources,
            undo: Vec::new(),
            frozen: Vec::new(),
        };
        for (index, device) in devices.iter().enumerate() {
            let source = &mut disks.sources[index];
            let Freeze {
                after,
                frozen,
                overlay,
                failed,
            } = source.freeze()?;
            let read_only = source.read_only();
            swap(device, &after);
            let before = std::mem::replace(source, after);
            disks.undo.push(Undo {
                device: device.clone(),
                before,
                overlay,
            });
            disks.frozen.push(DiskAtFork {
                content: frozen,
                read_only,
            });
            if let Some(error) = failed {
                return Err(error);
            }
        }
        Ok(disks)
    }

    /// Makes it final, and tells what the clones start from.
    pub(crate) fn keep(mut self) -> DisksAtFork {
        self.undo.clear();
        DisksAtFork(std::mem::take(&mut self.frozen))
    }
}

impl Drop for FrozenDisks<'_> {
    fn drop(&mut self) {
        for (undo, source) in self.undo.drain(..).zip(self.sources.iter_mut()) {
            let Undo {
                device,
                before,
                overlay,
            } = undo;
            if let Some(overlay) = overlay
                && let Err(error) = before.thaw(&overlay)
            {
                tracing::error!(
                    %error,
                    overlay = %overlay.display(),
                    "a fork failed and a disk cannot be written as before: its VM goes on in an overlay"
                );
                continue;
            }
            swap(&device, &before);
            *source = before;
        }
    }
}

fn swap(device: &Disk, source: &DiskSource) {
    device
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .model_mut()
        .swap_layer(source.layer());
}

impl FromIterator<(Arc<dyn BlockLayer>, bool)> for DisksAtFork {
    /// Of what each disk holds, and whether clones may not write to it.
    fn from_iter<I: IntoIterator<Item = (Arc<dyn BlockLayer>, bool)>>(disks: I) -> DisksAtFork {
        let disk = |(content, read_only)| DiskAtFork { content, read_only };
        DisksAtFork(disks.into_iter().map(disk).collect())
    }
}

impl DisksAtFork {
    /// What each disk holds, and whether clones may not write to it.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&Arc<dyn BlockLayer>, bool)> {
        self.0.iter().map(|disk| (&disk.content, disk.read_only))
    }

    /// Fresh disks for one clone.
    pub(crate) fn for_clone(&self) -> Vec<DiskSource> {
        let disk = |DiskAtFork { content, read_only }: &DiskAtFork| match read_only {
            true => DiskSource::ReadOnly(content.clone()),
            false => DiskSource::volatile(content.clone()),
        };
        self.0.iter().map(disk).collect()
    }
}

/// Why a disk could not be frozen or put back.
#[derive(Debug, Error)]
pub enum DisksError {
    /// The overlay that the parent would go on in.
    #[error("making the parent's overlay of a disk failed")]
    Overlay(#[from] OverlayError),
    /// The mark that keeps others from writing to the base.
    #[error("marking a disk as a frozen base failed")]
    Mark(#[from] MarkError),
    /// One more layer would be too many.
    #[error(
        "a disk has {most} layers, one for each fork that found it written, and no room for more: \
         end the VM, merge a disk file with `forkvm disk commit`, and start again"
    )]
    TooDeep {
        /// Most layers.
        most: u32,
    },
    /// Data that had to be on disk before.
    #[error("flushing disk {} failed", .disk.display())]
    Flush {
        /// The disk.
        disk: PathBuf,
        /// What the file system said.
        #[source]
        source: std::io::Error,
    },
}
