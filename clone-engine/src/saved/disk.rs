//! A disk of a saved machine: which files it stands on, and how they are known again.
//!
//! From the bottom up: a raw file; overlay files that forks have left over it; and what the VM held
//! in memory, however many layers of it, flattened into one overlay file of the saved machine. Raw
//! and overlay files are referenced, not copied: a restore refuses, by name, one that is not what it
//! was at the save.

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use forkvm_devices::SavedState;
use forkvm_devices::block::{BlockLayer, Overlay, Storage};
use serde::{Deserialize, Serialize};

use super::DiskSaveError;

/// Bytes that are copied at a time.
const COPY_LEN: u64 = 1 << 20;

/// Section `disk/<name>`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedDisk {
    /// How the VM used it.
    pub kind: DiskKind,
    /// The raw file at the bottom.
    pub base: SavedFile,
    /// Overlay files over it, from the bottom up.
    pub overlays: Vec<SavedOverlay>,
    /// Whether what the VM held in memory stands in an overlay file of the saved machine.
    pub sectors: bool,
}

impl SavedState for SavedDisk {
    const VERSION: u16 = 1;
}

/// How a VM uses a disk; see [`DiskSource`](crate::DiskSource).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskKind {
    /// The guest may not write to it.
    ReadOnly,
    /// The raw file itself is written.
    Raw,
    /// What is written stays in memory.
    Volatile,
    /// What is written goes to the topmost overlay file, over a frozen base.
    Durable,
}

impl DiskKind {
    /// The word in outputs.
    pub fn as_str(self) -> &'static str {
        match self {
            DiskKind::ReadOnly => "read-only",
            DiskKind::Raw => "raw",
            DiskKind::Volatile => "volatile",
            DiskKind::Durable => "durable",
        }
    }
}

/// The two files of an overlay.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedOverlay {
    /// Its sectors.
    pub data: SavedFile,
    /// Which sectors it holds.
    pub map: SavedFile,
}

/// A file as it was at the save.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedFile {
    /// Absolute path.
    pub path: PathBuf,
    /// Bytes.
    pub len: u64,
    /// Number of its inode.
    pub inode: u64,
    /// Time of the last change of its content, in nanoseconds since 1970.
    pub mtime_ns: i64,
    /// Time of the last change of its inode, in nanoseconds since 1970: a content that was changed
    /// behind a restored mtime shows here.
    pub ctime_ns: i64,
}

impl SavedFile {
    fn new(path: PathBuf, metadata: &Metadata) -> SavedFile {
        let ns = |seconds: i64, ns: i64| seconds.saturating_mul(1_000_000_000).saturating_add(ns);
        SavedFile {
            path,
            len: metadata.len(),
            inode: metadata.ino(),
            mtime_ns: ns(metadata.mtime(), metadata.mtime_nsec()),
            ctime_ns: ns(metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    /// The file at `path` as it is now.
    pub fn look(path: &Path) -> io::Result<SavedFile> {
        Ok(SavedFile::new(
            std::path::absolute(path)?,
            &fs::metadata(path)?,
        ))
    }

    /// What tells the file behind `metadata` from the one that was saved, in words; `None` when
    /// nothing does.
    pub fn difference(&self, metadata: &Metadata) -> Option<String> {
        let now = SavedFile::new(self.path.clone(), metadata);
        if now.len != self.len {
            return Some(format!("it has {} bytes and had {}", now.len, self.len));
        }
        if now.inode != self.inode {
            return Some("it is another file (inode)".into());
        }
        if now.mtime_ns != self.mtime_ns {
            return Some("it was written to (mtime)".into());
        }
        (now.ctime_ns != self.ctime_ns).then(|| "it was touched (ctime)".into())
    }
}

fn look(path: &Path) -> Result<SavedFile, DiskSaveError> {
    SavedFile::look(path).map_err(|source| DiskSaveError::Look {
        path: path.into(),
        source,
    })
}

impl SavedDisk {
    /// Flushes the disk `top`, finds the files that it stands on, and writes what its layers in
    /// memory hold to the new overlay file `sectors`, if that is anything.
    pub(super) fn save(
        kind: DiskKind,
        top: &Arc<dyn BlockLayer>,
        sectors: &Path,
    ) -> Result<SavedDisk, DiskSaveError> {
        // Before the look at the files: a flush may write an overlay's map.
        top.flush().map_err(DiskSaveError::Content)?;
        let mut in_memory: Vec<&Arc<dyn BlockLayer>> = Vec::new();
        let mut overlays = Vec::new();
        let mut layer = top;
        let base = loop {
            match layer.storage() {
                Storage::Overlay {
                    path: None, base, ..
                } if overlays.is_empty() => {
                    in_memory.push(layer);
                    layer = base;
                }
                Storage::Overlay {
                    path: Some(path),
                    base,
                    ..
                } => {
                    let data = look(path)?;
                    let map = look(&Overlay::map_path(path))?;
                    overlays.push(SavedOverlay { data, map });
                    layer = base;
                }
                Storage::Raw { path, file } => {
                    let found = look(path)?;
                    let open = file.metadata().map_err(DiskSaveError::Content)?;
                    if found.difference(&open).is_some() {
                        return Err(DiskSaveError::Replaced { path: path.into() });
                    }
                    break found;
                }
                Storage::Overlay { path: None, .. } | Storage::Unknown => {
                    return Err(DiskSaveError::Unknown);
                }
            }
        };
        overlays.reverse();
        let sectors = write_sectors(top, &in_memory, layer, sectors)?;
        Ok(SavedDisk {
            kind,
            base,
            overlays,
            sectors,
        })
    }
}

/// Writes all that the layers `in_memory` of the disk `top` hold to a new overlay file over `below`.
/// Returns whether they held anything; otherwise there is no file.
fn write_sectors(
    top: &Arc<dyn BlockLayer>,
    in_memory: &[&Arc<dyn BlockLayer>],
    below: &Arc<dyn BlockLayer>,
    path: &Path,
) -> Result<bool, DiskSaveError> {
    let mut overlay = None;
    let mut buffer = vec![0; COPY_LEN.min(top.len()) as usize];
    let mut at = 0;
    while at < top.len() {
        let (present, len) = presence(in_memory, at).map_err(DiskSaveError::Content)?;
        let len = len.min(top.len() - at);
        if !present {
            at += len;
            continue;
        }
        let part = &mut buffer[..len.min(COPY_LEN) as usize];
        let file = match &overlay {
            Some(file) => file,
            None => overlay.insert(Overlay::create(path, below.clone())?),
        };
        top.read_at(at, part).map_err(DiskSaveError::Content)?;
        file.write_at(at, part).map_err(DiskSaveError::Content)?;
        at += part.len() as u64;
    }
    if let Some(file) = &overlay {
        file.flush().map_err(DiskSaveError::Content)?;
    }
    Ok(overlay.is_some())
}

/// Whether any of `layers` holds the sector at `offset`, and for how many bytes that is so.
fn presence(layers: &[&Arc<dyn BlockLayer>], offset: u64) -> io::Result<(bool, u64)> {
    let mut run = (false, u64::MAX);
    for layer in layers {
        let presence = layer.presence(offset)?;
        run = match (run.0, presence.present) {
            (false, true) => (true, presence.len),
            (true, true) => (true, run.1.max(presence.len)),
            (true, false) => run,
            (false, false) => (false, run.1.min(presence.len)),
        };
    }
    Ok(run)
}
