//! The name of an image, by which processes speak of it.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

/// Tells an image from every other one of this host. An image that arrives from another process keeps
/// its name, so that whoever has it already, made it or took it over before, does not take it twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct ImageName {
    /// Of the process that made it: process ids come again, random numbers of 64 bits do not.
    process: u64,
    /// In that process.
    number: u64,
}

impl ImageName {
    /// Of an image that is made here.
    pub(super) fn new() -> ImageName {
        static PROCESS: OnceLock<u64> = OnceLock::new();
        static LAST: AtomicU64 = AtomicU64::new(0);
        ImageName {
            // What the standard library keys its hash tables with: bytes of the kernel's.
            process: *PROCESS.get_or_init(|| RandomState::new().build_hasher().finish()),
            number: LAST.fetch_add(1, Ordering::Relaxed),
        }
    }
}
