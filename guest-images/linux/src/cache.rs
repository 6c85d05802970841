//! Where images are kept: `$XDG_CACHE_HOME/forkvm/images`, one directory `NAME-HASH` each.
//!
//! An image appears there whole, by one rename, and goes whole, by another. Whoever builds holds the
//! lock of the cache, so two builders wait for each other; whoever looks needs no lock. A directory
//! whose name begins with a dot is work of a builder. The system lets go of a lock when its holder
//! dies, so such a directory that is there while nobody holds the lock is a dead builder's, and the
//! next one removes it.

use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use etcetera::BaseStrategy;
use tempfile::TempDir;
use thiserror::Error;

use crate::fingerprint::Fingerprint;
use crate::image::{Image, ImageError};
use crate::watch::{Step, Watch};

const LOCK: &str = ".lock";
const LOGS: &str = "logs";
/// Directories that a builder works in, and those that are on their way out.
const WORK: &str = ".work-";
/// How long a builder waits before it tries the lock again.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How long programs of a builder that was killed are waited for: longer than any step of make is silent.
const ORPHANS_END: Duration = Duration::from_secs(60);

/// The directory of all images.
#[derive(Clone, Debug)]
pub struct Cache {
    images: PathBuf,
}

/// The right to build in a cache; let go when this is dropped.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

/// What [`Cache::remove_stale`] or [`Cache::remove`] took away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Removed {
    /// The directory or file.
    pub path: PathBuf,
    /// What its files held, in bytes.
    pub bytes: u64,
}

impl Cache {
    /// The user's own, `$XDG_CACHE_HOME/forkvm/images`, or that in `~/.cache`.
    pub fn of_user() -> Result<Cache, CacheError> {
        let strategy = etcetera::base_strategy::Xdg::new().map_err(|_| CacheError::NoHome)?;
        Ok(Cache::at(strategy.cache_dir().join("forkvm/images")))
    }

    /// A directory, which need not be there yet.
    pub fn at(images: PathBuf) -> Cache {
        Cache { images }
    }

    /// The directory.
    pub fn directory(&self) -> &Path {
        &self.images
    }

    /// Where an image is, or will be.
    pub(crate) fn place(&self, name: &str, inputs: &Fingerprint) -> PathBuf {
        self.images.join(format!("{name}-{}", inputs.short()))
    }

    /// Where the whole output of a failed build is kept.
    pub(crate) fn log(&self, name: &str, inputs: &Fingerprint) -> Result<PathBuf, CacheError> {
        let logs = self.images.join(LOGS);
        fs::create_dir_all(&logs).map_err(failed("making the directory", &logs))?;
        Ok(logs.join(format!("{name}-{}.log", inputs.short())))
    }

    /// The image of these inputs; none where there is none, or a damaged one.
    pub(crate) fn find(&self, name: &str, inputs: &Fingerprint) -> Option<Image> {
        let place = self.place(name, inputs);
        match Image::open(&place) {
            Ok(image) if image.hash() == inputs.hash() => Some(image),
            Ok(image) => {
                tracing::warn!(place = %place.display(), hash = image.hash(), "another image lies here: it is built anew");
                None
            }
            Err(ImageError::Read { source, .. })
                if source.kind() == ErrorKind::NotFound && !place.exists() =>
            {
                None
            }
            Err(error) => {
                tracing::warn!(%error, "the image is damaged: it is built anew");
                None
            }
        }
    }

    /// Waits until nobody else builds here. `None`: told to stop meanwhile.
    pub(crate) fn lock(&self, watch: &mut dyn Watch) -> Result<Option<Lock>, CacheError> {
        fs::create_dir_all(&self.images).map_err(failed("making the directory", &self.images))?;
        let path = self.images.join(LOCK);
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(failed("opening the lock", &path))?;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Some(Lock { _file: file })),
                Err(TryLockError::WouldBlock) if watch.stop() => return Ok(None),
                Err(TryLockError::WouldBlock) => {
                    watch.at(Step::Waiting, 0, 0);
                    thread::sleep(LOOK_EVERY);
                }
                Err(TryLockError::Error(source)) => {
                    return Err(failed("locking", &path)(source));
                }
            }
        }
    }

    /// A directory to build in, on the file system that images are on.
    pub(crate) fn work(&self, _lock: &Lock) -> Result<TempDir, CacheError> {
        tempfile::Builder::new()
            .prefix(WORK)
            .tempdir_in(&self.images)
            .map_err(failed("making a directory in", &self.images))
    }

    /// Moves a finished image to its place. What lies there already is damaged, and goes.
    pub(crate) fn publish(
        &self,
        _lock: &Lock,
        from: &Path,
        place: &Path,
    ) -> Result<(), CacheError> {
        if place.symlink_metadata().is_ok() {
            self.take_away(place)?;
        }
        fs::rename(from, place).map_err(failed("moving the image to", place))?;
        let synced = File::open(&self.images).and_then(|images| images.sync_all());
        synced.map_err(failed("syncing", &self.images))
    }

    /// Removes what dead builders left. Returns what it removed.
    pub(crate) fn sweep(&self, _lock: &Lock) -> Result<Vec<Removed>, CacheError> {
        let mut removed = Vec::new();
        for path in self.entries()? {
            let name = path.file_name().unwrap_or_default();
            if name.as_encoded_bytes().starts_with(WORK.as_bytes()) {
                removed.push(remove(&path)?);
            }
        }
        Ok(removed)
    }

    /// All images, by name and then the one that was used last first. What is damaged is left out.
    pub fn images(&self) -> Result<Vec<Image>, CacheError> {
        let mut images: Vec<_> = self
            .entries()?
            .into_iter()
            .filter_map(|path| Image::open(&path).ok())
            .collect();
        let used = |image: &Image| image.used().unwrap_or(SystemTime::UNIX_EPOCH);
        images.sort_by(|one, other| {
            one.name()
                .cmp(other.name())
                .then_with(|| used(other).cmp(&used(one)))
        });
        Ok(images)
    }

    /// The image of that name that was used last.
    pub fn newest(&self, name: &str) -> Result<Option<Image>, CacheError> {
        let mut images = self.images()?.into_iter();
        Ok(images.find(|image| image.name() == name))
    }

    /// Removes all images of `name`, or the one whose directory is called that. A machine that runs
    /// keeps what it has opened.
    pub fn remove(&self, name: &str) -> Result<Vec<Removed>, CacheError> {
        let mut removed = Vec::new();
        for image in self.images()? {
            let directory = image.directory();
            if image.name() == name || directory.file_name().is_some_and(|found| found == name) {
                removed.push(self.take_away(directory)?);
            }
        }
        if removed.is_empty() {
            return Err(CacheError::None {
                name: name.to_owned(),
                images: self.images.clone(),
            });
        }
        Ok(removed)
    }

    /// Removes what nobody is likely to ask for again: of each name, all images but the one that was
    /// built or asked for last; damaged ones; logs of failed builds; and what dead builders left,
    /// unless somebody builds right now.
    pub fn remove_stale(&self) -> Result<Vec<Removed>, CacheError> {
        if !self.images.exists() {
            return Ok(Vec::new());
        }
        let mut removed = Vec::new();
        // While somebody builds, work and log may be that builder's.
        let idle = self.lock(&mut Hurry)?;
        if let Some(lock) = &idle {
            removed.extend(self.sweep(lock)?);
            for path in list(&self.images.join(LOGS))? {
                removed.push(remove(&path)?);
            }
        }
        let images = self.images()?;
        for pair in images.windows(2) {
            if pair[0].name() == pair[1].name() {
                removed.push(self.take_away(pair[1].directory())?);
            }
        }
        for path in self.entries()? {
            let name = path.file_name().unwrap_or_default().as_encoded_bytes();
            let is_image = !name.starts_with(b".") && name != LOGS.as_bytes();
            if is_image && let Err(error) = Image::open(&path) {
                // An image of a newer forkvm is whole to that one.
                if !matches!(error, ImageError::Newer { .. }) {
                    removed.push(self.take_away(&path)?);
                }
            }
        }
        Ok(removed)
    }

    /// Removes an image: first its name, so that nobody finds half of it.
    fn take_away(&self, path: &Path) -> Result<Removed, CacheError> {
        let leaving = tempfile::Builder::new()
            .prefix(WORK)
            .tempdir_in(&self.images)
            .map_err(failed("making a directory in", &self.images))?;
        let moved = leaving.path().join("image");
        fs::rename(path, &moved).map_err(failed("removing", path))?;
        let bytes = size(&moved);
        match leaving.close() {
            // A builder that begins right now takes it for a dead one's, and removes it as well.
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(failed("removing", path)(error));
            }
            _ => {}
        }
        Ok(Removed {
            path: path.to_owned(),
            bytes,
        })
    }

    fn entries(&self) -> Result<Vec<PathBuf>, CacheError> {
        list(&self.images)
    }
}

/// Does not wait for a lock.
struct Hurry;

impl Watch for Hurry {
    fn at(&mut self, _step: Step, _done: u64, _total: u64) {}

    fn stop(&self) -> bool {
        true
    }
}

/// What is in a directory, by name; nothing where there is none.
fn list(directory: &Path) -> Result<Vec<PathBuf>, CacheError> {
    let reading = || failed("reading the directory", directory);
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(reading()(error)),
    };
    let mut paths = Vec::new();
    for entry in entries {
        paths.push(entry.map_err(reading())?.path());
    }
    paths.sort();
    Ok(paths)
}

fn remove(path: &Path) -> Result<Removed, CacheError> {
    let bytes = size(path);
    let start = Instant::now();
    loop {
        let removed = if path.is_dir() {
            fs::remove_dir_all(path)
        } else {
            fs::remove_file(path)
        };
        match removed {
            // What a builder that was killed had started ends with the next line that it prints. It may
            // write into the directory until then.
            Err(error)
                if error.kind() == ErrorKind::DirectoryNotEmpty
                    && start.elapsed() < ORPHANS_END =>
            {
                thread::sleep(LOOK_EVERY);
            }
            // Another process removes the same.
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(failed("removing", path)(error));
            }
            _ => {
                return Ok(Removed {
                    path: path.to_owned(),
                    bytes,
                });
            }
        }
    }
}

/// Bytes of the files in a directory and below it; of a file, its own. For people: what cannot be read is
/// not counted.
fn size(path: &Path) -> u64 {
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => fs::read_dir(path)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| size(&entry.path()))
            .sum(),
        Ok(found) => found.len(),
        Err(_) => 0,
    }
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CacheError {
    let path = path.to_owned();
    move |source| CacheError::Io {
        action,
        path,
        source,
    }
}

/// The cache cannot be used.
#[derive(Debug, Error)]
pub enum CacheError {
    /// Nothing says where it is.
    #[error("neither XDG_CACHE_HOME nor HOME says where the cache of images is: set one of them")]
    NoHome,
    /// A file system that is full, or read-only, or another user's.
    #[error("{action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Nothing to remove.
    #[error("there is no image {name:?} in {}; `forkvm image ls` lists them", images.display())]
    None {
        /// As it was given.
        name: String,
        /// The cache.
        images: PathBuf,
    },
}
