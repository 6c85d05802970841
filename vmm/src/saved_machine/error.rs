//! Why a machine could not be saved to, or opened from, a directory.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::memory_file::MemoryFileError;
use crate::state_file::{EncodeError, StateFileError};

/// Why a machine could not be saved to, or opened from, a directory.
#[derive(Debug, Error)]
pub enum SavedMachineError {
    /// There is something under the name already.
    #[error("cannot save to {dir}: it exists already; name another directory, or remove it")]
    Exists {
        /// The directory.
        dir: PathBuf,
    },
    /// The path does not end in a name, as `/` and `..` do not.
    #[error("cannot save to {dir}: the path has to end in the name of a new directory")]
    NoName {
        /// The path.
        dir: PathBuf,
    },
    /// Another save to the same place is under way.
    #[error("cannot save to {dir}: another save to it is under way in {partial}")]
    Busy {
        /// The directory.
        dir: PathBuf,
        /// Where the other save builds it.
        partial: PathBuf,
    },
    /// The name is not one that a file beside state and memory can have.
    #[error(
        "{name:?} cannot be the name of a file of a saved machine: it has to be a plain file name, \
         other than \"state\" and \"memory\""
    )]
    FileName {
        /// The name.
        name: String,
    },
    /// State or memory was never written.
    #[error("the save is not complete: its {missing} was not written")]
    Incomplete {
        /// Name of the missing file.
        missing: &'static str,
    },
    /// The kernel gave no random mark.
    #[error("cannot draw a random id for the save")]
    Random {
        /// What the kernel said.
        source: io::Error,
    },
    /// The file system refused.
    #[error("cannot {what} {path}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The save is there, but a power loss may still undo it.
    #[error("{dir} is saved, but cannot be made durable: syncing its parent directory failed")]
    NotDurable {
        /// The directory.
        dir: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The state does not fit into a state file.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// The state file cannot be used.
    #[error("{path}: {source}")]
    State {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: StateFileError,
    },
    /// The state was written without memory.
    #[error("{path} is a state without memory: it was not written as part of a saved machine")]
    StateAlone {
        /// The file.
        path: PathBuf,
    },
    /// The memory file cannot be used, or not be written.
    #[error(transparent)]
    Memory(#[from] MemoryFileError),
}

/// For `map_err`: a system call on a path.
pub(super) fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SavedMachineError {
    move |source| SavedMachineError::Io {
        what,
        path: path.to_owned(),
        source,
    }
}
