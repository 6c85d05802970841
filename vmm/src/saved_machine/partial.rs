//! A directory that appears under its name complete, or never.

use std::ffi::{OsStr, OsString};
use std::fs::{self, DirBuilder, File, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::error::{self, SavedMachineError};

/// How often, 10 ms apart, to try for a partial directory that another process is just removing.
const ATTEMPTS: u32 = 50;

/// A directory under construction, `DIR.partial-<pid>`; removed when dropped before its commit.
#[derive(Debug)]
pub(super) struct Partial {
    /// Where it is to appear.
    dir: PathBuf,
    parent: PathBuf,
    path: PathBuf,
    /// The open directory. Its lock tells others that the save is alive.
    lock: File,
    committed: bool,
}

impl Partial {
    /// Creates the partial directory for `dir`, and removes those of dead processes.
    pub(super) fn create(dir: &Path) -> Result<Partial, SavedMachineError> {
        let Some(name) = dir.file_name() else {
            return Err(SavedMachineError::NoName {
                dir: dir.to_owned(),
            });
        };
        refuse_existing(dir)?;
        let parent = match dir.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        let mut prefix = name.to_owned();
        prefix.push(".partial-");
        let mut own_name = prefix.clone();
        own_name.push(std::process::id().to_string());
        let path = parent.join(own_name);
        for attempt in 0..ATTEMPTS {
            if attempt > 0 {
                std::thread::sleep(Duration::from_millis(10));
            }
            remove_abandoned(&parent, &prefix)?;
            if let Some(lock) = create_locked(&path)? {
                return Ok(Partial {
                    dir: dir.to_owned(),
                    parent,
                    path,
                    lock,
                    committed: false,
                });
            }
        }
        Err(SavedMachineError::Busy {
            dir: dir.to_owned(),
            partial: path,
        })
    }

    /// Where to put the files.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Syncs everything and gives the directory its name.
    pub(super) fn commit(mut self) -> Result<(), SavedMachineError> {
        for entry in fs::read_dir(&self.path).map_err(error::io("list", &self.path))? {
            let path = entry.map_err(error::io("list", &self.path))?.path();
            File::open(&path)
                .and_then(|file| file.sync_all())
                .map_err(error::io("sync", &path))?;
        }
        self.lock
            .sync_all()
            .map_err(error::io("sync", &self.path))?;
        refuse_existing(&self.dir)?;
        // Between the look and the rename only an empty directory could be replaced: rename(2)
        // refuses files and directories with content.
        fs::rename(&self.path, &self.dir)
            .map_err(error::io("give its name to the finished save", &self.path))?;
        self.committed = true;
        File::open(&self.parent)
            .and_then(|parent| parent.sync_all())
            .map_err(|source| SavedMachineError::NotDurable {
                dir: self.dir.clone(),
                source,
            })
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if self.committed {
            return;
        }
        if let Err(error) = fs::remove_dir_all(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "a save that failed leaves its files");
        }
    }
}

fn refuse_existing(dir: &Path) -> Result<(), SavedMachineError> {
    // Not `exists`: a symbolic link that leads nowhere is something too.
    match fs::symlink_metadata(dir) {
        Ok(_) => Err(SavedMachineError::Exists {
            dir: dir.to_owned(),
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(error::io("look at", dir)(source)),
    }
}

/// Creates and locks the directory. `None` when somebody else has it: another save of this process,
/// or a process that takes it for abandoned between its creation and its lock.
fn create_locked(path: &Path) -> Result<Option<File>, SavedMachineError> {
    match DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(None),
        Err(source) => return Err(error::io("create", path)(source)),
    }
    try_lock(path)
}

/// Locks the directory at `path`; `None` when it is gone or somebody else has locked it.
fn try_lock(path: &Path) -> Result<Option<File>, SavedMachineError> {
    let dir = match File::open(path) {
        Ok(dir) => dir,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(error::io("open", path)(source)),
    };
    match dir.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(None),
        Err(TryLockError::Error(source)) => return Err(error::io("lock", path)(source)),
    }
    // Removed or renamed between opening and locking: the lock is then on something else.
    let locked = dir.metadata().map_err(error::io("look at", path))?;
    let same = fs::symlink_metadata(path)
        .is_ok_and(|there| (there.dev(), there.ino()) == (locked.dev(), locked.ino()));
    Ok(same.then_some(dir))
}

/// Removes the directories in `parent` that begin with `prefix`, end in a process number, and that
/// no process holds.
fn remove_abandoned(parent: &Path, prefix: &OsStr) -> Result<(), SavedMachineError> {
    for entry in fs::read_dir(parent).map_err(error::io("list", parent))? {
        let entry = entry.map_err(error::io("list", parent))?;
        if !is_partial(&entry.file_name(), prefix) || !entry.file_type().is_ok_and(|t| t.is_dir()) {
            continue;
        }
        let path = entry.path();
        // One that cannot be removed, such as another user's, does not stand in the way.
        match try_lock(&path) {
            Ok(None) => {}
            Ok(Some(_held_until_removed)) => {
                tracing::info!(path = %path.display(), "removing what a killed save has left");
                if let Err(error) = fs::remove_dir_all(&path) {
                    tracing::warn!(path = %path.display(), %error, "cannot remove an abandoned save");
                }
            }
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "cannot look at an abandoned save");
            }
        }
    }
    Ok(())
}

fn is_partial(name: &OsString, prefix: &OsStr) -> bool {
    name.as_encoded_bytes()
        .strip_prefix(prefix.as_encoded_bytes())
        .is_some_and(|pid| !pid.is_empty() && pid.iter().all(u8::is_ascii_digit))
}
