//! Opening a saved machine: the only place of a restore that knows paths.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use forkvm_devices::block::{
    Access, BlockLayer, Frozen, Overlay, OverlayError, RawFile, RawFileError,
};
use forkvm_devices::{SectionError, Sections};
use forkvm_vmm::VmConfig;
use forkvm_vmm::memory_file::MemoryFile;
use forkvm_vmm::saved_machine::{SavedMachine, SavedMachineError};
use thiserror::Error;

use super::disk::{DiskKind, SavedDisk, SavedFile, SavedOverlay};
use super::{disk_section, sectors_file};
use crate::disks::DiskSource;
use crate::working_set::WorkingSet;

/// A saved machine with everything that it needs open: what
/// [`Family::restore`](crate::Family::restore) takes.
pub struct OpenMachine {
    /// Its state.
    pub sections: Sections,
    /// Its memory, not yet read.
    pub memory: MemoryFile,
    /// Its disks, in the order of its configuration.
    pub disks: Vec<DiskSource>,
    /// What it will probably touch first, to be read at once by a restore with lazy memory: what
    /// [`Member::working_set`](crate::Member::working_set) said of an earlier restore of the same
    /// machine. Empty at first.
    pub working_set: WorkingSet,
}

impl OpenMachine {
    /// Opens the machine that was saved to `dir`, and locks its disks as the saved VM did. Changes
    /// nothing in `dir`, which can be opened any number of times, also at once.
    pub fn open(dir: &Path) -> Result<OpenMachine, OpenError> {
        let SavedMachine {
            sections, memory, ..
        } = SavedMachine::open(dir)?;
        let config = VmConfig::of_state(&sections)?;
        let open = |(index, name): (usize, String)| -> Result<DiskSource, OpenError> {
            let section = disk_section(&name);
            let section = sections
                .find(&section)
                .ok_or(SectionError::Missing { kind: section })?;
            let sectors = dir.join(sectors_file(index));
            open_disk(&section.decode()?, &sectors)
                .map_err(|source| OpenError::Disk { disk: name, source })
        };
        let names = config.disks.into_iter().map(|disk| disk.name);
        let disks = names.enumerate().map(open).collect::<Result<_, _>>()?;
        Ok(OpenMachine {
            sections,
            memory,
            disks,
            working_set: WorkingSet::default(),
        })
    }

    /// What the machine is.
    pub fn config(&self) -> Result<VmConfig, SectionError> {
        VmConfig::of_state(&self.sections)
    }
}

/// Opens the files of a disk, from the bottom up.
fn open_disk(disk: &SavedDisk, sectors: &Path) -> Result<DiskSource, DiskOpenError> {
    let base = open_base(disk)?;
    let below: Arc<dyn BlockLayer> = match disk.kind {
        DiskKind::Raw => return Ok(DiskSource::Raw(base)),
        DiskKind::Durable => Arc::new(Frozen::new(base.clone())),
        DiskKind::ReadOnly | DiskKind::Volatile => base.clone(),
    };
    let (top, below_top) = match (disk.kind, disk.overlays.split_last()) {
        (DiskKind::Durable, Some((top, below_top))) => (Some(top), below_top),
        _ => (None, disk.overlays.as_slice()),
    };
    let mut layer = below;
    for overlay in below_top {
        layer = Arc::new(Overlay::open_read_only(&overlay.data.path, layer)?);
        check_overlay(overlay)?;
    }
    if let Some(overlay) = top {
        let top = Arc::new(Overlay::open(&overlay.data.path, layer)?);
        check_overlay(overlay)?;
        return Ok(DiskSource::Durable { base, top });
    }
    if disk.sectors {
        layer = Arc::new(Overlay::open_read_only(sectors, layer)?);
    }
    Ok(match disk.kind {
        DiskKind::ReadOnly => DiskSource::ReadOnly(layer),
        _ => DiskSource::volatile(layer),
    })
}

/// Opens and locks the raw file, then compares it: nobody changes it behind the look.
fn open_base(disk: &SavedDisk) -> Result<Arc<RawFile>, DiskOpenError> {
    let path = &disk.base.path;
    let write = matches!(disk.kind, DiskKind::Raw | DiskKind::Durable);
    let file = OpenOptions::new()
        .read(true)
        .write(write)
        .open(path)
        .map_err(io_error(path))?;
    // A duplicate shares the lock, and closing it does not release that.
    let look = file.try_clone().map_err(io_error(path))?;
    let base = match disk.kind {
        DiskKind::Raw => RawFile::from_file(file, path, Access::ReadWrite)?,
        DiskKind::Durable => {
            let overlays = disk
                .overlays
                .iter()
                .map(|overlay| overlay.data.path.as_path());
            RawFile::from_frozen(file, path, &overlays.collect::<Vec<_>>())?
        }
        DiskKind::ReadOnly | DiskKind::Volatile => {
            RawFile::from_file(file, path, Access::ReadOnly)?
        }
    };
    check(&disk.base, &look)?;
    Ok(Arc::new(base))
}

/// Looks at the files of an overlay that is open and locked.
fn check_overlay(overlay: &SavedOverlay) -> Result<(), DiskOpenError> {
    for saved in [&overlay.data, &overlay.map] {
        let metadata = fs::metadata(&saved.path).map_err(io_error(&saved.path))?;
        if let Some(what) = saved.difference(&metadata) {
            return Err(DiskOpenError::Changed {
                path: saved.path.clone(),
                what,
            });
        }
    }
    Ok(())
}

fn check(saved: &SavedFile, file: &File) -> Result<(), DiskOpenError> {
    let metadata = file.metadata().map_err(io_error(&saved.path))?;
    match saved.difference(&metadata) {
        Some(what) => Err(DiskOpenError::Changed {
            path: saved.path.clone(),
            what,
        }),
        None => Ok(()),
    }
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> DiskOpenError {
    move |source| match source.kind() {
        io::ErrorKind::NotFound => DiskOpenError::Missing { path: path.into() },
        _ => DiskOpenError::Io {
            path: path.into(),
            source,
        },
    }
}

/// Why a saved machine cannot be opened.
#[derive(Debug, Error)]
pub enum OpenError {
    /// State or memory is missing, damaged, newer, foreign, or of different saves.
    #[error(transparent)]
    Machine(#[from] SavedMachineError),
    /// A section that says what to open.
    #[error(transparent)]
    Section(#[from] SectionError),
    /// A disk is not what it was.
    #[error("disk {disk} of the saved machine cannot be used")]
    Disk {
        /// Its name.
        disk: String,
        /// Why.
        #[source]
        source: DiskOpenError,
    },
}

/// Why a disk of a saved machine cannot be opened.
#[derive(Debug, Error)]
pub enum DiskOpenError {
    /// A file that it stands on is gone.
    #[error("{} does not exist: put it back where it was at the save", .path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// A file that it stands on is not what it was.
    #[error(
        "{} has changed since the machine was saved: {what}; the guest would find a disk that does \
         not fit its memory, so put the former file back",
        .path.display()
    )]
    Changed {
        /// The file.
        path: PathBuf,
        /// What differs.
        what: String,
    },
    /// The raw file: short, locked, forked since, ….
    #[error(transparent)]
    Raw(#[from] RawFileError),
    /// An overlay file.
    #[error(transparent)]
    Overlay(#[from] OverlayError),
    /// The file system failed.
    #[error("{} cannot be opened or looked at", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What it said.
        #[source]
        source: io::Error,
    },
}
