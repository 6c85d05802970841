//! A template that is being made: in a directory that has no name yet.
//!
//! Whoever makes one holds a lock in its directory, which the kernel gives up with the process: what a killed process
//! left is known by a lock that nobody holds, and goes with the next template that is begun.

use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;
use tempfile::TempDir;

use super::manifest::HashedFile;
use super::{MACHINE, MANIFEST, Manifest, Template, TemplateError, failed};

/// Begins the names of directories that are no templates: theirs begin with no dot.
const WORK: &str = ".work-";

/// Held by whoever works in such a directory.
const LOCK: &str = "lock";

/// See the module's text. Dropped, it leaves nothing.
#[derive(Debug)]
pub struct Draft {
    name: String,
    /// Of all templates.
    templates: PathBuf,
    work: Work,
}

/// A directory to work in, and its lock.
#[derive(Debug)]
pub(super) struct Work {
    directory: TempDir,
    _lock: File,
}

impl Work {
    pub(super) fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Removes it, and says what went wrong.
    pub(super) fn close(self) -> io::Result<()> {
        self.directory.close()
    }
}

/// A directory among the templates that is none, and the end of those that killed processes left.
pub(super) fn work_directory(templates: &Path) -> Result<Work, TemplateError> {
    let make = || -> io::Result<Work> {
        // A machine's memory is its owner's alone.
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o700).create(templates)?;
        sweep(templates)?;
        let directory = tempfile::Builder::new()
            .prefix(WORK)
            .tempdir_in(templates)?;
        let lock = File::create(directory.path().join(LOCK))?;
        lock.lock()?;
        Ok(Work {
            directory,
            _lock: lock,
        })
    };
    make().map_err(failed("making a directory in", templates))
}

/// One that has no lock yet was made a moment ago.
fn sweep(templates: &Path) -> io::Result<()> {
    for entry in fs::read_dir(templates)? {
        let entry = entry?;
        if !entry
            .file_name()
            .as_encoded_bytes()
            .starts_with(WORK.as_bytes())
        {
            continue;
        }
        let Ok(lock) = File::open(entry.path().join(LOCK)) else {
            continue;
        };
        match lock.try_lock() {
            Ok(()) => fs::remove_dir_all(entry.path())?,
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(error)) => return Err(error),
        }
    }
    Ok(())
}

impl Draft {
    pub(super) fn begin(templates: &Path, name: &str) -> Result<Draft, TemplateError> {
        Ok(Draft {
            name: name.into(),
            templates: templates.into(),
            work: work_directory(templates)?,
        })
    }

    /// Where its machine is to be saved: a directory that is not there yet.
    pub fn machine(&self) -> PathBuf {
        self.work.path().join(MACHINE)
    }

    /// Makes the template, of the machine that was saved and of `files` elsewhere that it is made of as well: a kernel, disks.
    ///
    /// # Errors
    /// [`TemplateError::Exists`] where somebody was faster, [`TemplateError::Io`].
    pub fn finish(
        self,
        about: serde_json::Value,
        files: &[PathBuf],
    ) -> Result<Template, TemplateError> {
        let work = self.work.path();
        let mut made_of = Vec::new();
        let machine = self.machine();
        let what = || failed("listing", &machine);
        for entry in fs::read_dir(&machine).map_err(what())? {
            let path = Path::new(MACHINE).join(entry.map_err(what())?.file_name());
            made_of.push(HashedFile::of(work, &path)?);
        }
        made_of.sort_by(|one, other| one.file.path.cmp(&other.file.path));
        for file in files {
            let path = fs::canonicalize(file).map_err(failed("finding", file))?;
            made_of.push(HashedFile::of(work, &path)?);
        }
        let manifest = Manifest::new(about, made_of);
        let place = work.join(MANIFEST);
        write(&place, &manifest).map_err(failed("writing", &place))?;
        let lock = work.join(LOCK);
        fs::remove_file(&lock).map_err(failed("removing", &lock))?;

        let directory = self.templates.join(&self.name);
        match renameat_with(CWD, work, CWD, &directory, RenameFlags::NOREPLACE) {
            Ok(()) => {}
            Err(Errno::EXIST) => return Err(TemplateError::Exists { name: self.name }),
            Err(error) => return Err(failed("moving the template to", &directory)(error.into())),
        }
        // It has another name now, and is not to be removed.
        drop(self.work.directory.keep());
        let sync = File::open(&self.templates).and_then(|templates| templates.sync_all());
        sync.map_err(failed("writing", &self.templates))?;
        Ok(Template {
            name: self.name,
            directory,
            manifest,
        })
    }
}

/// A disk may say only at the end that it is full.
fn write(place: &Path, manifest: &Manifest) -> io::Result<()> {
    let mut file = File::create_new(place)?;
    file.write_all(&manifest.to_json()?)?;
    file.sync_all()
}
