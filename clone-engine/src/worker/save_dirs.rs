//! Where the clones of a worker are saved to.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use forkvm_vmm::PausedVm;

use crate::disks::DiskSource;
use crate::identity::Identity;
use crate::saved::{SaveError, SaveTo, Saver};

type Generation = [u8; 16];

/// The saver of a worker's family. Its clones may be of several families of the engine, each of
/// which saves elsewhere or nowhere.
#[derive(Default)]
pub(super) struct SaveDirs(Mutex<HashMap<Generation, PathBuf>>);

/// As long as it is there, a clone can be saved.
pub(super) struct Entry {
    dirs: Arc<SaveDirs>,
    clone: Generation,
}

impl SaveDirs {
    /// The clone `identity` is saved to where [`SaveTo`] of `dir` puts it.
    pub(super) fn add(self: &Arc<Self>, identity: &Identity, dir: PathBuf) -> Entry {
        let clone = identity.generation;
        let mut dirs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        dirs.insert(clone, dir);
        Entry {
            dirs: self.clone(),
            clone,
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut dirs = self.dirs.0.lock().unwrap_or_else(PoisonError::into_inner);
        dirs.remove(&self.clone);
    }
}

impl Saver for SaveDirs {
    fn save(
        &self,
        identity: &Identity,
        vm: &mut PausedVm<'_>,
        disks: &[DiskSource],
    ) -> Result<(), SaveError> {
        let dirs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let dir = dirs.get(&identity.generation).cloned();
        drop(dirs);
        SaveTo::new(dir.ok_or(SaveError::NoPlace)?).save(identity, vm, disks)
    }
}
