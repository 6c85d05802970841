//! Disks of a VM, and what a fork makes of them.
//!
//! A fork freezes every disk at its instant: what was the topmost layer becomes the read-only base
//! of all, the parent goes on in a fresh overlay over it, and so does each clone. A read-only disk
//! is simply shared.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};

use forkvm_devices::block::{BlockLayer, Frozen, MarkError, Overlay, OverlayError, RawFile};
use forkvm_vmm::Disk;
use thiserror::Error;

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

    /// The disk of a clone over `frozen`, what this disk was at the fork.
    fn of_clone(&self, frozen: &Arc<dyn BlockLayer>) -> DiskSource {
        match self {
            DiskSource::ReadOnly(layer) => DiskSource::ReadOnly(layer.clone()),
            _ => DiskSource::volatile(frozen.clone()),
        }
    }

    /// What the parent goes on with after the fork, and the layer that is now immutable.
    fn freeze(&self) -> Result<(DiskSource, Arc<dyn BlockLayer>), DisksError> {
        let frozen = |layer| -> Arc<dyn BlockLayer> { Arc::new(Frozen::new(layer)) };
        Ok(match self {
            DiskSource::ReadOnly(layer) => (self.clone(), layer.clone()),
            DiskSource::Volatile(layer) => {
                let base = frozen(layer.clone());
                (DiskSource::volatile(base.clone()), base)
            }
            DiskSource::Raw(file) => DiskSource::stack(file, frozen(file.clone()))?,
            DiskSource::Durable { base, top } => {
                // What the mark says must be on disk: the overlay that is left behind is final.
                top.flush().map_err(|source| DisksError::Flush { disk: base.path().into(), source })?;
                DiskSource::stack(base, frozen(top.clone()))?
            }
        })
    }

    /// One more overlay file for the raw `file`, over its present content `below`.
    fn stack(
        file: &Arc<RawFile>,
        below: Arc<dyn BlockLayer>,
    ) -> Result<(DiskSource, Arc<dyn BlockLayer>), DisksError> {
        let path = free_overlay_path(file.path());
        let top = Arc::new(Overlay::create(&path, below.clone())?);
        if let Err(error) = file.freeze_as_base(&path) {
            if let Err(leftover) = Overlay::remove_files(&path) {
                tracing::warn!(%leftover, "the overlay of a fork that failed could not be removed");
            }
            return Err(error.into());
        }
        Ok((DiskSource::Durable { base: file.clone(), top }, below))
    }

    /// Undoes [`DiskSource::freeze`], of which `after` is the first result.
    fn thaw(&self, after: &DiskSource) -> Result<(), DisksError> {
        if let DiskSource::Durable { base, top } = after {
            let path = top.path().unwrap_or_else(|| Path::new(""));
            base.unfreeze(path)?;
            Overlay::remove_files(path)?;
        }
        Ok(())
    }
}

/// `DISK.overlay-1`, or the first number that is free.
fn free_overlay_path(disk: &Path) -> PathBuf {
    let numbered = |number: u32| {
        let mut name = disk.as_os_str().to_owned();
        name.push(format!(".overlay-{number}"));
        PathBuf::from(name)
    };
    (1..).map(numbered).find(|path| !path.exists()).expect("some number is free")
}

/// The disks of a paused VM, frozen. Dropped without [`FrozenDisks::keep`], it puts all back.
pub(crate) struct FrozenDisks {
    devices: Vec<Disk>,
    before: Vec<DiskSource>,
    after: Vec<DiskSource>,
    frozen: Vec<Arc<dyn BlockLayer>>,
    kept: bool,
}

/// What a clone's disks are made from.
pub(crate) struct DisksAtFork {
    sources: Vec<DiskSource>,
    frozen: Vec<Arc<dyn BlockLayer>>,
}

impl FrozenDisks {
    /// Freezes the disks that `devices` work on.
    pub(crate) fn freeze(
        devices: &[Disk],
        sources: &[DiskSource],
    ) -> Result<FrozenDisks, DisksError> {
        let mut disks = FrozenDisks {
            devices: devices.to_vec(),
            before: Vec::new(),
            after: Vec::new(),
            frozen: Vec::new(),
            kept: false,
        };
        for (device, source) in devices.iter().zip(sources) {
            let (after, frozen) = source.freeze()?;
            swap(device, &after);
            disks.before.push(source.clone());
            disks.after.push(after);
            disks.frozen.push(frozen);
        }
        Ok(disks)
    }

    /// Makes it final: what the parent goes on with, and what its clones start from.
    pub(crate) fn keep(mut self) -> (Vec<DiskSource>, DisksAtFork) {
        self.kept = true;
        let sources = std::mem::take(&mut self.before);
        let frozen = std::mem::take(&mut self.frozen);
        (std::mem::take(&mut self.after), DisksAtFork { sources, frozen })
    }
}

impl Drop for FrozenDisks {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        for ((device, before), after) in self.devices.iter().zip(&self.before).zip(&self.after) {
            swap(device, before);
            if let Err(error) = before.thaw(after) {
                tracing::error!(%error, "a disk could not be put back after a fork that failed");
            }
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

impl DisksAtFork {
    /// Fresh disks for one clone.
    pub(crate) fn for_clone(&self) -> Vec<DiskSource> {
        self.sources.iter().zip(&self.frozen).map(|(source, frozen)| source.of_clone(frozen)).collect()
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
