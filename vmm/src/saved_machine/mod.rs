//! A machine on disk: a directory with its `state`, its `memory` and the files of its disks.
//!
//! [`SaveDir`] makes one so that it is there whole or not at all, whenever the process is killed:
//! everything is built in `DIR.partial-<pid>` beside it, synced, and renamed to `DIR` as the last
//! step. [`SavedMachine`] opens one. Neither knows what is in a state section or on a disk. Called
//! by the command line (`--save`, `restore`) and by templates.
//!
//! The process that builds a partial directory holds a lock on it (flock(2)), which ends with the
//! process. A partial directory without that lock is the rest of a killed save: the next save to
//! the same place removes it. The lock decides, not the process number, which is in the name for
//! people: numbers are used again, and mean nothing in another PID namespace.

mod error;
mod partial;

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use forkvm_devices::Sections;

use crate::memory_file::{self, MemoryFile, MemoryFileError, MemorySource, Progress, Written};
use crate::state_file::{self, SaveId, StateFile, StateFileError};
use partial::Partial;

pub use error::SavedMachineError;

/// Name of the state file in the directory.
const STATE: &str = "state";

/// Name of the memory file in the directory.
const MEMORY: &str = "memory";

/// A machine that is being saved. Dropped before [`commit`](SaveDir::commit), it leaves nothing.
///
/// The directory and its files are for the owner only: a guest's memory holds its secrets.
#[derive(Debug)]
pub struct SaveDir {
    partial: Partial,
    save: SaveId,
}

impl SaveDir {
    /// Starts a save to `dir`, whose parent exists and which itself does not.
    ///
    /// Removes what a killed save to the same place has left.
    ///
    /// # Errors
    /// [`SavedMachineError::Exists`], [`SavedMachineError::Busy`], and what the file system says.
    pub fn create(dir: &Path) -> Result<SaveDir, SavedMachineError> {
        let save = SaveId::random().map_err(|source| SavedMachineError::Random { source })?;
        Ok(SaveDir {
            partial: Partial::create(dir)?,
            save,
        })
    }

    /// The mark that this save's state and memory carry.
    pub fn save(&self) -> SaveId {
        self.save
    }

    /// Where the files are until [`commit`](Self::commit), which syncs whatever is there: for what
    /// has to be made by its path.
    pub fn path(&self) -> &Path {
        self.partial.path()
    }

    /// Creates a file for something else, such as a disk's overlay, to be written by the caller
    /// before [`commit`](Self::commit), which syncs it.
    ///
    /// # Errors
    /// A `name` that is not a plain file name, or is taken (`state` and `memory` are).
    pub fn create_file(&self, name: &str) -> Result<File, SavedMachineError> {
        check_name(name)?;
        self.create_new(name).map(|(file, _)| file)
    }

    /// Writes the memory file. `progress` counts bytes of guest memory.
    pub fn write_memory<S: MemorySource + ?Sized>(
        &self,
        source: &S,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Written, SavedMachineError> {
        let (file, path) = self.create_new(MEMORY)?;
        memory_file::write(&file, self.save, source, progress).map_err(|fault| {
            SavedMachineError::Memory(MemoryFileError {
                file: path.display().to_string(),
                fault,
            })
        })
    }

    /// Writes the state file.
    pub fn write_state(&self, sections: &Sections) -> Result<(), SavedMachineError> {
        let bytes = state_file::encode(sections, Some(self.save))?;
        let (mut file, path) = self.create_new(STATE)?;
        file.write_all(&bytes).map_err(error::io("write", &path))
    }

    /// Makes the save appear under its name, and durable.
    ///
    /// # Errors
    /// [`SavedMachineError::Incomplete`] when state or memory was not written, and what the file
    /// system says; there is nothing under the name then. The exception is
    /// [`SavedMachineError::NotDurable`]: the save is there, but may not survive a power loss.
    pub fn commit(self) -> Result<(), SavedMachineError> {
        for name in [STATE, MEMORY] {
            if !self.partial.path().join(name).exists() {
                return Err(SavedMachineError::Incomplete { missing: name });
            }
        }
        self.partial.commit()
    }

    fn create_new(&self, name: &str) -> Result<(File, PathBuf), SavedMachineError> {
        let path = self.partial.path().join(name);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(error::io("create", &path))?;
        Ok((file, path))
    }
}

/// A saved machine, opened: its state is read and checked, its memory file open.
#[derive(Debug)]
pub struct SavedMachine {
    /// The state.
    pub sections: Sections,
    /// The memory, of the same save. Its length is not yet compared with the state's: see
    /// [`MemoryFile::check_len`].
    pub memory: MemoryFile,
    dir: PathBuf,
}

impl SavedMachine {
    /// Opens the machine that was saved to `dir`.
    ///
    /// # Errors
    /// Anything missing or damaged, but for the memory's content, which is checked as it is read;
    /// state and memory of different saves.
    pub fn open(dir: &Path) -> Result<SavedMachine, SavedMachineError> {
        let path = dir.join(STATE);
        let state_error = |source: StateFileError| SavedMachineError::State {
            path: path.clone(),
            source,
        };
        let file = File::open(&path).map_err(error::io("open", &path))?;
        let StateFile { save, sections } = state_file::read(file).map_err(state_error)?;
        let Some(save) = save else {
            return Err(SavedMachineError::StateAlone { path });
        };
        let path = dir.join(MEMORY);
        let file = File::open(&path).map_err(error::io("open", &path))?;
        let memory = MemoryFile::open(file, path.display().to_string())?;
        memory.check_save(save)?;
        Ok(SavedMachine {
            sections,
            memory,
            dir: dir.to_owned(),
        })
    }

    /// Opens a file that was put beside state and memory, read-only.
    pub fn open_file(&self, name: &str) -> Result<File, SavedMachineError> {
        check_name(name)?;
        let path = self.dir.join(name);
        File::open(&path).map_err(error::io("open", &path))
    }
}

/// Whether `name` can be another file's name in the directory.
fn check_name(name: &str) -> Result<(), SavedMachineError> {
    let plain = Path::new(name).file_name() == Some(OsStr::new(name));
    if plain && name != STATE && name != MEMORY {
        return Ok(());
    }
    Err(SavedMachineError::FileName {
        name: name.to_owned(),
    })
}
