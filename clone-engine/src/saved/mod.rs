//! Machines on disk: a VM of a family saved to a directory, and started again from it.
//!
//! [`SaveTo`] writes a paused VM: its state, its memory and what its disks hold beyond the raw files
//! that they stand on ([`disk`]). [`OpenMachine::open`] opens such a directory with every file that
//! the machine needs, and [`Family::restore`](crate::Family::restore) makes a VM from what is open;
//! only the former knows paths. The format of the files is `forkvm_vmm::saved_machine`'s.

pub mod disk;
mod open;
mod restore;
mod save_to;

use std::io;
use std::path::{Path, PathBuf};

use forkvm_devices::SectionError;
use forkvm_devices::block::OverlayError;
use forkvm_vmm::saved_machine::SavedMachineError;
use forkvm_vmm::{MemoryError, PauseError, PausedVm, VmError};
use thiserror::Error;

use crate::disks::DiskSource;
use crate::identity::Identity;

pub use disk::SavedFile;
pub use open::{OpenError, OpenMachine};
pub use restore::RestoreError;
pub use save_to::SaveTo;

/// Section of a machine's state that says who it was.
pub const IDENTITY: &str = "identity";

/// Section of the disk `name`.
pub fn disk_section(name: &str) -> String {
    format!("disk/{name}")
}

/// Name, in the directory of a saved machine, of what its disk number `index` held in memory.
fn sectors_file(index: usize) -> String {
    format!("disk-{index}.overlay")
}

/// Saves machines. Called in the thread that serves the VM.
pub trait Saver: Send + Sync {
    /// Saves `vm`, whose disks are `disks`. The VM ends afterwards; on an error it runs on.
    fn save(
        &self,
        identity: &Identity,
        vm: &mut PausedVm<'_>,
        disks: &[DiskSource],
    ) -> Result<(), SaveError>;

    /// The directory of a [`SaveTo`] that saves the same: clones that live in other processes are saved
    /// there, by it. Without one they are not saved.
    fn directory(&self) -> Option<&Path> {
        None
    }
}

/// Why a machine was not saved.
#[derive(Debug, Error)]
pub enum SaveError {
    /// Its family saves nowhere.
    #[error("there is no place to save to: start the machine with --save DIR")]
    NoPlace,
    /// It lives in another process, which could not save it.
    #[error("process {process} could not save it: {why}")]
    Elsewhere {
        /// The process.
        process: u32,
        /// What went wrong there.
        why: String,
    },
    /// It ended before it was asked to stand still.
    #[error("the guest has just ended the machine: there is nothing left to save")]
    Ended,
    /// Some of its memory could not be read.
    #[error("a page of the machine's memory cannot be had, so it ends and cannot be saved")]
    Lost,
    /// It did not stand still.
    #[error(transparent)]
    Pause(#[from] PauseError),
    /// Its state could not be read.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// Its populated memory could not be found.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The identity or a disk could not be encoded.
    #[error(transparent)]
    Section(#[from] SectionError),
    /// The directory could not be written.
    #[error(transparent)]
    Directory(#[from] SavedMachineError),
    /// A disk could not be saved.
    #[error("saving disk {disk} failed")]
    Disk {
        /// Its name.
        disk: String,
        /// Why.
        #[source]
        source: DiskSaveError,
    },
}

/// Why a disk was not saved.
#[derive(Debug, Error)]
pub enum DiskSaveError {
    /// It is kept by a layer that only this process knows.
    #[error(
        "it is kept where a later process cannot find it: only raw files, and overlays over them, \
         can be saved"
    )]
    Unknown,
    /// Under the path of an open file there is another file now.
    #[error("{} was replaced while the VM had it open: put the former file back", .path.display())]
    Replaced {
        /// The path.
        path: PathBuf,
    },
    /// The overlay with its content could not be made.
    #[error(transparent)]
    Overlay(#[from] OverlayError),
    /// Its content could not be copied.
    #[error("reading, copying or flushing its content failed")]
    Content(#[source] io::Error),
    /// A file that it stands on could not be looked at.
    #[error("cannot look at {}", .path.display())]
    Look {
        /// The path.
        path: PathBuf,
        /// What the file system said.
        #[source]
        source: io::Error,
    },
}
