//! Machines on disk.

use forkvm_vmm::{PauseError, PausedVm, VmError};
use thiserror::Error;

use crate::disks::DiskSource;
use crate::identity::Identity;

/// Saves machines. Called in the thread that serves the VM.
pub trait Saver: Send + Sync {
    /// Saves `vm`, whose disks are `disks`. The VM ends afterwards; on an error it runs on.
    fn save(
        &self,
        identity: &Identity,
        vm: &mut PausedVm<'_>,
        disks: &[DiskSource],
    ) -> Result<(), SaveError>;
}

/// Why a machine was not saved.
#[derive(Debug, Error)]
pub enum SaveError {
    /// Its family saves nowhere.
    #[error("there is no place to save to: start the machine with --save DIR")]
    NoPlace,
    /// It did not stand still.
    #[error(transparent)]
    Pause(#[from] PauseError),
    /// Its state could not be read.
    #[error(transparent)]
    Vm(#[from] VmError),
}
