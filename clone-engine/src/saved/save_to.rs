//! Saving a VM of a family to a directory.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use forkvm_devices::Section;
use forkvm_vmm::PausedVm;
use forkvm_vmm::memory_file::Progress;
use forkvm_vmm::saved_machine::SaveDir;

use super::{IDENTITY, SaveError, Saver, disk, disk_section, sectors_file};
use crate::disks::DiskSource;
use crate::identity::Identity;

/// Saves the machines of one family.
///
/// The VM that was booted or restored goes to the directory itself; a clone that asks to be saved
/// goes to `DIR-NAME` beside it, so that it does not take its parent's place.
pub struct SaveTo {
    dir: PathBuf,
    /// The directory is meant for one VM, whichever that is.
    exactly: bool,
    progress: Arc<dyn Fn(Progress) + Send + Sync>,
}

impl SaveTo {
    /// Saves to `dir`, whose parent exists and which itself does not.
    pub fn new(dir: impl Into<PathBuf>) -> SaveTo {
        SaveTo {
            dir: dir.into(),
            exactly: false,
            progress: Arc::new(|_| {}),
        }
    }

    /// Saves one VM, a clone or not, to `dir` itself.
    pub fn exactly(dir: impl Into<PathBuf>) -> SaveTo {
        SaveTo {
            exactly: true,
            ..SaveTo::new(dir)
        }
    }

    /// Has `progress` told how far the memory is, in bytes of guest memory.
    pub fn with_progress(self, progress: impl Fn(Progress) + Send + Sync + 'static) -> SaveTo {
        SaveTo {
            progress: Arc::new(progress),
            ..self
        }
    }

    /// Where a VM of this name and depth is saved.
    pub fn dir_of(&self, identity: &Identity) -> PathBuf {
        if self.exactly || identity.depth == 0 {
            return self.dir.clone();
        }
        let mut dir = self.dir.as_os_str().to_owned();
        dir.push(format!("-{}", identity.name));
        PathBuf::from(dir)
    }
}

impl Saver for SaveTo {
    fn save(
        &self,
        identity: &Identity,
        vm: &mut PausedVm<'_>,
        disks: &[DiskSource],
    ) -> Result<(), SaveError> {
        if vm.has_ended() {
            return Err(SaveError::Ended);
        }
        let save = SaveDir::create(&self.dir_of(identity))?;
        let mut sections = vm.save()?.to_sections()?;
        sections.push(Section::encode(IDENTITY, identity)?)?;
        let names = vm.config().disks.iter().map(|disk| disk.name.clone());
        for (index, (name, source)) in names.zip(disks).enumerate() {
            let saved =
                save_disk(source, &save.path().join(sectors_file(index))).map_err(|source| {
                    SaveError::Disk {
                        disk: name.clone(),
                        source,
                    }
                })?;
            sections.push(Section::encode(disk_section(&name), &saved)?)?;
        }
        save.write_memory(&vm.ram().source()?, &mut |progress| {
            (self.progress)(progress)
        })?;
        save.write_state(&sections)?;
        if vm.is_condemned() {
            return Err(SaveError::Lost);
        }
        save.commit()?;
        tracing::info!(vm = identity.name, dir = %self.dir_of(identity).display(), "saved");
        Ok(())
    }

    fn directory(&self) -> Option<&Path> {
        Some(&self.dir)
    }
}

/// Flushes a disk, says what it stands on, and writes what it holds in memory to `sectors`.
fn save_disk(source: &DiskSource, sectors: &Path) -> Result<disk::SavedDisk, super::DiskSaveError> {
    let kind = match source {
        DiskSource::ReadOnly(_) => disk::DiskKind::ReadOnly,
        DiskSource::Raw(_) => disk::DiskKind::Raw,
        DiskSource::Volatile(_) => disk::DiskKind::Volatile,
        DiskSource::Durable { .. } => disk::DiskKind::Durable,
    };
    disk::SavedDisk::save(kind, &source.layer(), sectors)
}
