//! Templates: machines that were saved under a name, for clones to start from at any later time.
//!
//! A template is a directory of the user's, `$XDG_DATA_HOME/forkvm/templates/NAME` (or in `~/.local/share`): the saved
//! machine in `machine`, and `template.json` ([`Manifest`]), which says what it is made of. It appears whole, by one
//! rename ([`Draft`]), and what it is made of must stay as it was: each use holds the files against inode, size, mtime and
//! ctime, [`Template::verify`] against their hashes. Who boots the machine, and who starts clones of it, is elsewhere; nothing
//! here knows of a guest.

mod draft;
mod manifest;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use etcetera::BaseStrategy;
use forkvm_clone_engine::saved::{OpenError, OpenMachine};
use thiserror::Error;

pub use draft::Draft;
pub use manifest::{HashedFile, Manifest};

/// The file that says what a template is made of.
const MANIFEST: &str = "template.json";

/// The saved machine.
const MACHINE: &str = "machine";

/// The templates of a user.
#[derive(Clone, Debug)]
pub struct Templates {
    directory: PathBuf,
}

impl Templates {
    /// The user's own: `$XDG_DATA_HOME/forkvm/templates`, or that in `~/.local/share`.
    ///
    /// # Errors
    /// [`TemplateError::NoHome`].
    pub fn of_user() -> Result<Templates, TemplateError> {
        let strategy = etcetera::base_strategy::Xdg::new().map_err(|_| TemplateError::NoHome)?;
        Ok(Templates::at(strategy.data_dir().join("forkvm/templates")))
    }

    /// Those in a directory, which need not be there yet.
    pub fn at(directory: PathBuf) -> Templates {
        Templates { directory }
    }

    /// The directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// All names, sorted.
    ///
    /// # Errors
    /// [`TemplateError::Io`].
    pub fn names(&self) -> Result<Vec<String>, TemplateError> {
        let what = failed("listing", &self.directory);
        let entries = match fs::read_dir(&self.directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.and_then(Iterator::collect::<io::Result<Vec<_>>>),
        };
        let names = entries.map_err(what)?.into_iter();
        let mut names: Vec<String> = names
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| check_name(name).is_ok())
            .collect();
        names.sort();
        Ok(names)
    }

    /// The template `name`, whose files have not been looked at yet.
    ///
    /// # Errors
    /// [`TemplateError::Unknown`], [`TemplateError::Damaged`].
    pub fn find(&self, name: &str) -> Result<Template, TemplateError> {
        check_name(name)?;
        let directory = self.directory.join(name);
        if !directory.is_dir() {
            return Err(TemplateError::Unknown { name: name.into() });
        }
        let manifest = Manifest::read(&directory.join(MANIFEST))?;
        Ok(Template {
            name: name.into(),
            directory,
            manifest,
        })
    }

    /// Begins the template `name`.
    ///
    /// # Errors
    /// [`TemplateError::Exists`], [`TemplateError::Name`], [`TemplateError::Io`].
    pub fn begin(&self, name: &str) -> Result<Draft, TemplateError> {
        check_name(name)?;
        if self.directory.join(name).symlink_metadata().is_ok() {
            return Err(TemplateError::Exists { name: name.into() });
        }
        Draft::begin(&self.directory, name)
    }

    /// Removes the template `name`. Machines that were restored lazily from it and still run keep their memory.
    ///
    /// # Errors
    /// [`TemplateError::Unknown`], [`TemplateError::Io`].
    pub fn remove(&self, name: &str) -> Result<(), TemplateError> {
        check_name(name)?;
        let directory = self.directory.join(name);
        if !directory.is_dir() {
            return Err(TemplateError::Unknown { name: name.into() });
        }
        // It goes whole: half of one would be found under its name.
        let gone = draft::work_directory(&self.directory)?;
        let moved = gone.path().join(name);
        fs::rename(&directory, moved).map_err(failed("removing", &directory))?;
        gone.close().map_err(failed("removing", &directory))
    }
}

/// A template.
#[derive(Clone, Debug)]
pub struct Template {
    name: String,
    directory: PathBuf,
    manifest: Manifest,
}

impl Template {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it is.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// What it is made of.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Its machine, to be restored any number of times. All that it is made of is as it was, as far as inodes, sizes and times
    /// tell.
    ///
    /// # Errors
    /// [`TemplateError::Changed`] names the first file that is not, [`TemplateError::Open`].
    pub fn machine(&self) -> Result<OpenMachine, TemplateError> {
        for file in &self.manifest.files {
            self.unless_changed(file.looks_changed(&self.directory))?;
        }
        OpenMachine::open(&self.directory.join(MACHINE)).map_err(|source| TemplateError::Open {
            name: self.name.clone(),
            source,
        })
    }

    /// Reads all that it is made of and compares the hashes. `progress` is told how many bytes of how many are behind.
    ///
    /// # Errors
    /// [`TemplateError::Changed`] names the first file that differs.
    pub fn verify(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<(), TemplateError> {
        let total = self.manifest.bytes();
        let mut done = 0;
        for file in &self.manifest.files {
            self.unless_changed(file.looks_changed(&self.directory))?;
            let mut count = |read: u64| {
                done += read;
                progress(done, total);
            };
            self.unless_changed(file.reads_changed(&self.directory, &mut count))?;
        }
        Ok(())
    }

    fn unless_changed(&self, found: Result<(), (PathBuf, String)>) -> Result<(), TemplateError> {
        found.map_err(|(path, what)| TemplateError::Changed {
            name: self.name.clone(),
            path,
            what,
        })
    }
}

/// Names become names of directories, and of VMs.
fn check_name(name: &str) -> Result<(), TemplateError> {
    let plain = |letter: char| letter.is_ascii_alphanumeric() || "._-".contains(letter);
    if name.is_empty() || name.starts_with('.') || !name.chars().all(plain) {
        return Err(TemplateError::Name { name: name.into() });
    }
    Ok(())
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> TemplateError {
    let path = path.to_owned();
    move |source| TemplateError::Io { what, path, source }
}

/// Why there is no template.
#[derive(Debug, Error)]
pub enum TemplateError {
    /// Nobody says where they are.
    #[error("neither XDG_DATA_HOME nor HOME says where templates are: set one of them")]
    NoHome,
    /// Not a name.
    #[error(
        "{name:?} is no name of a template: it is made of letters, digits and .-_, and begins with no dot"
    )]
    Name {
        /// What was given.
        name: String,
    },
    /// No such template.
    #[error("there is no template {name}: `forkvm template ls` lists those that there are")]
    Unknown {
        /// Its name.
        name: String,
    },
    /// The name is taken.
    #[error("there is a template {name} already: `forkvm template rm {name}` removes it")]
    Exists {
        /// Its name.
        name: String,
    },
    /// Not what a template holds.
    #[error("{} says nothing that this version understands: {what}", path.display())]
    Damaged {
        /// The manifest.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// Something that it is made of is not what it was.
    #[error(
        "{} has changed since the template {name} was made: {what}; put the former file back, or make the template anew",
        path.display()
    )]
    Changed {
        /// The template.
        name: String,
        /// The file.
        path: PathBuf,
        /// What differs.
        what: String,
    },
    /// Its machine cannot be opened.
    #[error("the machine of the template {name} cannot be used")]
    Open {
        /// The template.
        name: String,
        /// Why.
        #[source]
        source: OpenError,
    },
    /// The file system failed.
    #[error("{what} {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// What it said.
        #[source]
        source: io::Error,
    },
}

#[cfg(test)]
mod tests;
