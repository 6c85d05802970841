//! Which sectors an overlay holds, in memory and in the file beside a file overlay.
//!
//! The file: magic (8 bytes), version u32, crc32 u32 of all that follows, size of the disk in
//! bytes u64, then the set of sectors in roaring's portable 64-bit format. Integers are
//! little-endian. It is written whole ([`durable::replace`]), so a half-written one cannot exist.

use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use roaring::RoaringTreemap;
use thiserror::Error;

use super::{SECTOR, durable};

const MAGIC: &[u8; 8] = b"FKVMPMAP";
const VERSION: u32 = 1;
const HEADER_LEN: usize = 24;
const CRC_END: usize = 16;

/// A set of sectors of a disk; offsets here are in bytes and whole sectors.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct PresenceMap(RoaringTreemap);

impl PresenceMap {
    /// Where the map of the overlay file `overlay` is kept.
    pub(super) fn path_of(overlay: &Path) -> PathBuf {
        durable::beside(overlay, ".map")
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Bytes of all sectors in the set.
    pub(super) fn bytes(&self) -> u64 {
        self.0.len() * SECTOR
    }

    /// Adds `range`; says whether anything of it was missing.
    pub(super) fn insert(&mut self, range: Range<u64>) -> bool {
        self.0
            .insert_range(range.start / SECTOR..range.end / SECTOR)
            > 0
    }

    /// The part of `range` from its start on that is in the set as a whole, or not at all.
    pub(super) fn first_run(&self, range: Range<u64>) -> (Range<u64>, bool) {
        let (start, end) = (range.start / SECTOR, range.end / SECTOR);
        let present = self.0.contains(start);
        let run_end = if present {
            self.first_absent(start, end)
        } else {
            self.next(start, end)
        };
        (range.start..run_end * SECTOR, present)
    }

    /// Cuts `range` into runs that are in the set as a whole, or not at all.
    pub(super) fn runs(&self, range: Range<u64>) -> impl Iterator<Item = (Range<u64>, bool)> {
        let mut rest = range;
        std::iter::from_fn(move || {
            let run = (!rest.is_empty()).then(|| self.first_run(rest.clone()))?;
            rest.start = run.0.end;
            Some(run)
        })
    }

    /// First sector of `start..end` in the set, else `end`.
    fn next(&self, start: u64, end: u64) -> u64 {
        let mut sectors = self.0.iter();
        sectors.advance_to(start);
        sectors.next().map_or(end, |sector| sector.min(end))
    }

    /// First sector of `start..end` not in the set, else `end`; `start` is in it. By bisection: a
    /// run can be as long as the disk.
    fn first_absent(&self, start: u64, end: u64) -> u64 {
        let before = self.0.rank(start).wrapping_sub(start);
        let (mut inside, mut outside) = (start, end);
        while inside + 1 < outside {
            let middle = inside + (outside - inside) / 2;
            // Sectors up to and with `middle`: short of a full run when one is missing in between.
            let full = self.0.rank(middle) == before.wrapping_add(middle);
            if full {
                inside = middle
            } else {
                outside = middle
            }
        }
        outside
    }

    /// Reads the map of `overlay`, for a disk of `disk_len` bytes.
    pub(super) fn load(overlay: &Path, disk_len: u64) -> Result<PresenceMap, MapError> {
        let path = PresenceMap::path_of(overlay);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(MapError::Missing { path });
            }
            Err(source) => return Err(MapError::Io { path, source }),
        };
        PresenceMap::decode(&bytes, disk_len).map_err(|what| MapError::Damaged { path, what })
    }

    /// Replaces the map of `overlay`.
    pub(super) fn store(&self, overlay: &Path, disk_len: u64) -> Result<(), MapError> {
        let path = PresenceMap::path_of(overlay);
        self.encode(disk_len)
            .and_then(|bytes| durable::replace(&path, &bytes))
            .map_err(|source| MapError::Io { path, source })
    }

    /// As it stands in the file.
    pub(super) fn encode(&self, disk_len: u64) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(HEADER_LEN + self.0.serialized_size());
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&disk_len.to_le_bytes());
        self.0.serialize_into(&mut bytes)?;
        let crc = crc32fast::hash(&bytes[CRC_END..]);
        bytes[CRC_END - 4..CRC_END].copy_from_slice(&crc.to_le_bytes());
        Ok(bytes)
    }

    /// Of the bytes of a file, and of a disk of `disk_len` bytes; or what is wrong with them.
    pub(super) fn decode(bytes: &[u8], disk_len: u64) -> Result<PresenceMap, String> {
        let field = |range: Range<usize>| {
            let mut word = [0; 8];
            word[..range.len()].copy_from_slice(&bytes[range]);
            u64::from_le_bytes(word)
        };
        if bytes.len() < HEADER_LEN || &bytes[..8] != MAGIC {
            return Err("it does not start like a presence map".into());
        }
        let version = field(8..12);
        if version != u64::from(VERSION) {
            return Err(format!(
                "it has version {version}, this program reads {VERSION}"
            ));
        }
        if field(12..16) != u64::from(crc32fast::hash(&bytes[CRC_END..])) {
            return Err("its checksum is wrong".into());
        }
        let recorded = field(16..24);
        if recorded != disk_len {
            return Err(format!(
                "it is of a disk of {recorded} bytes, the base has {disk_len}"
            ));
        }
        let sectors = RoaringTreemap::deserialize_from(&bytes[HEADER_LEN..])
            .map_err(|error| format!("its set of sectors is damaged: {error}"))?;
        if sectors.max().is_some_and(|last| last >= disk_len / SECTOR) {
            return Err("it names sectors beyond the end of the disk".into());
        }
        Ok(PresenceMap(sectors))
    }
}

/// Why the map beside an overlay file cannot be read or written.
#[derive(Debug, Error)]
pub enum MapError {
    /// There is none.
    #[error(
        "the presence map {path} is missing: without it nobody knows which sectors the overlay \
         holds; put it back beside the overlay"
    )]
    Missing {
        /// Path of the map.
        path: PathBuf,
    },
    /// It cannot be used.
    #[error("the presence map {path} cannot be used: {what}; restore it together with its overlay")]
    Damaged {
        /// Path of the map.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// The file system failed.
    #[error("the presence map {path} could not be read or written")]
    Io {
        /// Path of the map.
        path: PathBuf,
        /// What the file system said.
        source: io::Error,
    },
}
