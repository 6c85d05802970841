//! Copy-on-write over another layer, sector by sector.
//!
//! Written and discarded sectors are in a sparse data file, at the offset they have on the disk; a
//! presence map says which. Everything else is read from the base, which is never written. The data
//! file is a memfd that exists from the first write on (a clone's overlay costs nothing while the
//! clone is idle), or a file with its map beside it ([`PresenceMap`]), locked while it is open.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use thiserror::Error;

use super::base_mark::lock_alone;
use super::presence_map::{MapError, PresenceMap};
use super::{BlockLayer, Frozen, Presence, SECTOR, Storage, check_range, durable, sparse};

/// A copy-on-write layer over `base`.
pub struct Overlay {
    base: Arc<dyn BlockLayer>,
    /// Path of the data file; `None` for a memfd.
    path: Option<PathBuf>,
    /// Whether the data file was locked here, and is to be unlocked: another process may have a duplicate
    /// of its descriptor.
    locked: bool,
    state: RwLock<State>,
}

/// What an overlay holds, apart from its base: to be handed to another process.
#[derive(Debug)]
pub struct HeldSectors {
    /// Which sectors, in the format of the map beside an overlay file; it knows damage when it sees it.
    pub map: Vec<u8>,
    /// The sectors themselves, at the offsets that they have on the disk; `None` when it holds none.
    pub data: Option<File>,
}

struct State {
    present: PresenceMap,
    /// Where present sectors are; `None` while nothing is present.
    data: Option<File>,
    /// The map beside the data file does not say all that `present` does.
    map_is_stale: bool,
    /// The base was flushed once, and nobody writes it: with many layers that is what a flush costs.
    base_is_durable: bool,
}

impl Overlay {
    /// An empty overlay whose data will be in memory.
    pub fn in_memory(base: Arc<dyn BlockLayer>) -> Overlay {
        let state = State {
            present: PresenceMap::default(),
            data: None,
            map_is_stale: false,
            base_is_durable: false,
        };
        Overlay {
            base,
            path: None,
            locked: false,
            state: RwLock::new(state),
        }
    }

    /// An empty overlay in the new file `path`. An overlay that is there already, but holds no
    /// sector and is not open, is taken for the rest of a killed process and replaced.
    pub fn create(
        path: impl Into<PathBuf>,
        base: Arc<dyn BlockLayer>,
    ) -> Result<Overlay, OverlayError> {
        let path = path.into();
        let options = OpenOptions::new().read(true).write(true).to_owned();
        let file = match options.clone().create_new(true).open(&path) {
            Ok(file) => lock(file, &path)?,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => reclaim(
                options.open(&path).map_err(io_error(&path))?,
                &path,
                base.len(),
            )?,
            Err(source) => return Err(OverlayError::Io { path, source }),
        };
        let present = PresenceMap::default();
        let created = file
            .set_len(base.len())
            .map_err(io_error(&path))
            .and_then(|()| Ok(present.store(&path, base.len())?));
        if let Err(error) = created {
            if let Err(leftover) = Overlay::remove_files(&path) {
                tracing::warn!(%leftover, "the rest of an overlay could not be removed");
            }
            return Err(error);
        }
        Ok(Overlay::over(base, path, file, present))
    }

    /// The overlay in the file `path`, over the base that it was made over.
    pub fn open(
        path: impl Into<PathBuf>,
        base: Arc<dyn BlockLayer>,
    ) -> Result<Overlay, OverlayError> {
        let path = path.into();
        let (file, present) = open_files(&path, base.len())?;
        Ok(Overlay::over(base, path, file, present))
    }

    /// The overlay in the file `path`, for reading only, together with other readers.
    pub fn open_read_only(
        path: impl Into<PathBuf>,
        base: Arc<dyn BlockLayer>,
    ) -> Result<Frozen, OverlayError> {
        let path = path.into();
        let file = File::open(&path).map_err(io_error(&path))?;
        match file.try_lock_shared() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(OverlayError::Locked { path }),
            Err(TryLockError::Error(source)) => return Err(io_error(&path)(source)),
        }
        let present = check_files(&file, &path, base.len())?;
        Ok(Frozen::new(Arc::new(Overlay::over(
            base, path, file, present,
        ))))
    }

    /// Removes the files of the overlay `path`, as far as they are there. An overlay that is open
    /// goes on without them until it is dropped.
    pub fn remove_files(path: &Path) -> Result<(), OverlayError> {
        let map = PresenceMap::path_of(path);
        for file in [path, &map, &durable::beside(&map, ".new")] {
            durable::remove(file).map_err(io_error(file))?;
        }
        Ok(())
    }

    /// What it holds now. The descriptor of its data is a duplicate: a lock on an overlay file stays
    /// as long as either is open.
    pub fn held(&self) -> io::Result<HeldSectors> {
        let state = self.read_state();
        Ok(HeldSectors {
            map: state.present.encode(self.base.len())?,
            data: state.data.as_ref().map(File::try_clone).transpose()?,
        })
    }

    /// The overlay that [`held`](Overlay::held) was asked of, over the same base. `path` is that of
    /// its data file, if it has one: what the map beside that file says must be what `held` says.
    pub fn from_held(
        held: HeldSectors,
        path: Option<PathBuf>,
        base: Arc<dyn BlockLayer>,
    ) -> Result<Overlay, HeldError> {
        let present = PresenceMap::decode(&held.map, base.len()).map_err(HeldError::Map)?;
        match &held.data {
            None if present.is_empty() => {}
            None => return Err(HeldError::NoData),
            Some(data) => {
                let len = data.metadata().map_err(HeldError::Data)?.len();
                if len != base.len() {
                    let disk_len = base.len();
                    return Err(HeldError::Size { len, disk_len });
                }
            }
        }
        let state = State {
            present,
            data: held.data,
            map_is_stale: false,
            base_is_durable: false,
        };
        Ok(Overlay {
            base,
            path,
            locked: false,
            state: RwLock::new(state),
        })
    }

    /// Path of the data file; `None` for an overlay in memory.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// Where the map of the overlay in the file `path` is kept.
    pub fn map_path(path: &Path) -> PathBuf {
        PresenceMap::path_of(path)
    }

    /// Bytes that the overlay itself holds.
    pub fn present_bytes(&self) -> u64 {
        self.read_state().present.bytes()
    }

    fn over(base: Arc<dyn BlockLayer>, path: PathBuf, file: File, present: PresenceMap) -> Overlay {
        let state = State {
            present,
            data: Some(file),
            map_is_stale: false,
            base_is_durable: false,
        };
        Overlay {
            base,
            path: Some(path),
            locked: true,
            state: RwLock::new(state),
        }
    }

    // A thread that panicked in here left a state that is whole: the data goes in before the map.
    fn read_state(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_state(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the data durable, then the map that names it.
    fn save(&self, state: &mut State) -> io::Result<()> {
        let (Some(path), Some(data)) = (&self.path, &state.data) else {
            return Ok(());
        };
        data.sync_data()?;
        if state.map_is_stale {
            state
                .present
                .store(path, self.base.len())
                .map_err(io::Error::other)?;
            state.map_is_stale = false;
        }
        Ok(())
    }
}

impl State {
    /// The data file; made now if the overlay is in memory and this is its first write.
    fn data(&mut self, disk_len: u64) -> io::Result<&File> {
        let data = match self.data.take() {
            Some(data) => data,
            None => {
                let memfd = sparse::memfd(c"forkvm-overlay")?;
                memfd.set_len(disk_len)?;
                memfd
            }
        };
        Ok(self.data.insert(data))
    }

    fn insert(&mut self, range: Range<u64>) {
        self.map_is_stale |= self.present.insert(range);
    }
}

impl BlockLayer for Overlay {
    fn len(&self) -> u64 {
        self.base.len()
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read_at(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let range = check_range(offset, data.len() as u64, self.len())?;
        let state = self.read_state();
        for (run, present) in state.present.runs(range) {
            let part = &mut data[(run.start - offset) as usize..(run.end - offset) as usize];
            match &state.data {
                Some(file) if present => file.read_exact_at(part, run.start)?,
                _ => self.base.read_at(run.start, part)?,
            }
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let range = check_range(offset, data.len() as u64, self.len())?;
        let mut state = self.write_state();
        state.data(self.base.len())?.write_all_at(data, offset)?;
        state.insert(range);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        if self.path.is_none() {
            return Ok(());
        }
        let mut state = self.write_state();
        self.save(&mut state)?;
        if !state.base_is_durable {
            // What lies below may have been written just before it was frozen.
            self.base.flush()?;
            state.base_is_durable = true;
        }
        Ok(())
    }

    fn discard(&self, range: Range<u64>) -> io::Result<()> {
        let len = range.end.saturating_sub(range.start);
        let range = check_range(range.start, len, self.len())?;
        let mut state = self.write_state();
        sparse::punch_hole(state.data(self.base.len())?, range.clone())?;
        state.insert(range);
        Ok(())
    }

    fn presence(&self, offset: u64) -> io::Result<Presence> {
        let rest = check_range(offset, SECTOR, self.len())?.start..self.len();
        let (run, present) = self.read_state().present.first_run(rest);
        Ok(Presence {
            present,
            len: run.end - run.start,
        })
    }

    fn depth(&self) -> u32 {
        self.base.depth().saturating_add(1)
    }

    fn storage(&self) -> Storage<'_> {
        Storage::Overlay {
            overlay: self,
            path: self.path(),
            base: &self.base,
        }
    }
}

/// A machine that ends without a last flush loses nothing: only a power loss may cost it data.
impl Drop for Overlay {
    fn drop(&mut self) {
        let mut state = self.write_state();
        let removed = match &state.data {
            Some(data) => data.metadata().is_ok_and(|metadata| metadata.nlink() == 0),
            None => true,
        };
        if state.map_is_stale
            && !removed
            && let Err(error) = self.save(&mut state)
        {
            let path = self.path.as_deref().unwrap_or(Path::new("")).display();
            tracing::error!(%error, %path, "an overlay could not be saved when it was closed");
        }
        if let (true, Some(data)) = (self.locked, &state.data)
            && let Err(error) = data.unlock()
        {
            tracing::warn!(%error, "an overlay could not be unlocked");
        }
    }
}

/// Opens and locks an overlay's data file and reads its map.
pub(super) fn open_files(path: &Path, disk_len: u64) -> Result<(File, PresenceMap), OverlayError> {
    let file = OpenOptions::new().read(true).write(true).open(path);
    let file = lock(file.map_err(io_error(path))?, path)?;
    let present = check_files(&file, path, disk_len)?;
    Ok((file, present))
}

/// Checks the data file of an overlay of a disk of `disk_len` bytes, and reads its map.
fn check_files(file: &File, path: &Path, disk_len: u64) -> Result<PresenceMap, OverlayError> {
    let len = file.metadata().map_err(io_error(path))?.len();
    if len != disk_len {
        return Err(OverlayError::Size {
            path: path.into(),
            len,
            disk_len,
        });
    }
    Ok(PresenceMap::load(path, disk_len)?)
}

/// Takes over an overlay file that was left behind, if nothing would be lost.
fn reclaim(file: File, path: &Path, disk_len: u64) -> Result<File, OverlayError> {
    let file = lock(file, path)?;
    let worthless = match PresenceMap::load(path, disk_len) {
        Ok(present) => present.is_empty(),
        Err(MapError::Missing { .. }) => file.metadata().map_err(io_error(path))?.blocks() == 0,
        Err(_) => false,
    };
    if !worthless {
        return Err(OverlayError::Exists { path: path.into() });
    }
    file.set_len(0).map_err(io_error(path))?;
    Ok(file)
}

fn lock(file: File, path: &Path) -> Result<File, OverlayError> {
    lock_alone(file)
        .map_err(io_error(path))?
        .ok_or_else(|| OverlayError::Locked { path: path.into() })
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> OverlayError {
    move |source| match source.kind() {
        io::ErrorKind::NotFound => OverlayError::Missing { path: path.into() },
        _ => OverlayError::Io {
            path: path.into(),
            source,
        },
    }
}

/// Why an overlay file could not be created or opened.
#[derive(Debug, Error)]
pub enum OverlayError {
    /// The file, or the directory for it, is not there.
    #[error("the overlay {path} does not exist: correct its path, or create its directory")]
    Missing {
        /// Path of the overlay.
        path: PathBuf,
    },
    /// A new overlay would overwrite one that holds data.
    #[error("the overlay {path} exists and holds data: commit it, remove it, or take another path")]
    Exists {
        /// Path of the overlay.
        path: PathBuf,
    },
    /// A VM has it open.
    #[error("the overlay {path} is open in a VM: end that VM first")]
    Locked {
        /// Path of the overlay.
        path: PathBuf,
    },
    /// It was made over another base, or is truncated.
    #[error(
        "the overlay {path} has {len} bytes, its base {disk_len}: it was made over another disk, \
         or one of the two was truncated"
    )]
    Size {
        /// Path of the overlay.
        path: PathBuf,
        /// Its length.
        len: u64,
        /// Length of the base.
        disk_len: u64,
    },
    /// Its presence map is missing or damaged.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The file system failed.
    #[error("the overlay {path} could not be created, opened or removed")]
    Io {
        /// Path of the overlay.
        path: PathBuf,
        /// What the file system said.
        source: io::Error,
    },
}

/// Why sectors that another process held cannot be taken over.
#[derive(Debug, Error)]
pub enum HeldError {
    /// The map is damaged, or of another disk.
    #[error("the map of an overlay that was handed over cannot be used: {0}")]
    Map(String),
    /// It names sectors and none came along.
    #[error("an overlay that was handed over names sectors and came without them")]
    NoData,
    /// The data is of a disk of another size.
    #[error("an overlay that was handed over has {len} bytes, its base {disk_len}")]
    Size {
        /// Its length.
        len: u64,
        /// Length of the base.
        disk_len: u64,
    },
    /// The data cannot be looked at.
    #[error("the data of an overlay that was handed over cannot be looked at")]
    Data(#[source] io::Error),
}
