//! How a parent's memory becomes an immutable image.
//!
//! A [`Freeze`] works on a paused VM. What it returns is undone by [`Freeze::thaw`] as long as the
//! VM has not run on, so that a later phase may fail.

mod copy;
mod remap;
mod stop;

use std::fmt;
use std::str::FromStr;

use forkvm_vmm::{Backing, MemoryError, PausedVm};
use thiserror::Error;

use crate::image::ImageBuilder;

/// A way to keep the memory of an instant.
pub trait Freeze: Send + Sync {
    /// Which one it is; never [`FreezeKind::Auto`].
    fn kind(&self) -> FreezeKind;

    /// Keeps the memory of `vm` as it is now. On an error the VM's memory is as it was.
    fn freeze(&self, vm: &mut PausedVm<'_>) -> Result<ImageBuilder, FreezeError>;

    /// Undoes [`freeze`](Freeze::freeze) on the same pause, before the image is published.
    fn thaw(&self, vm: &mut PausedVm<'_>, image: ImageBuilder) -> Result<(), FreezeError>;

    /// Whether the parent may run on afterwards.
    fn parent_goes_on(&self) -> bool;
}

/// The word for a [`Freeze`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum FreezeKind {
    /// The cheapest that serves: `Remap` where it can, `Copy` where the memory is private already.
    #[default]
    Auto,
    /// The parent's own memfd becomes the image and the parent goes on in a private mapping of it:
    /// nothing is copied. Once per VM, while it still maps its memfd shared.
    Remap,
    /// Populated memory is copied during the pause. Always possible, at any depth.
    Copy,
    /// The parent does not run on; its memory is the image.
    Stop,
}

impl FreezeKind {
    /// All words, for help texts and tests.
    pub const ALL: [FreezeKind; 4] = [
        FreezeKind::Auto,
        FreezeKind::Remap,
        FreezeKind::Copy,
        FreezeKind::Stop,
    ];

    /// The word in options and outputs.
    pub fn as_str(self) -> &'static str {
        match self {
            FreezeKind::Auto => "auto",
            FreezeKind::Remap => "remap",
            FreezeKind::Copy => "copy",
            FreezeKind::Stop => "stop",
        }
    }

    /// The way itself, chosen for a parent whose memory hangs on `backing`.
    pub(crate) fn choose(self, backing: &Backing) -> &'static dyn Freeze {
        match (self, backing) {
            (FreezeKind::Remap, _) | (FreezeKind::Auto, Backing::Shared(_)) => &remap::Remap,
            (FreezeKind::Copy, _) | (FreezeKind::Auto, Backing::Private(_)) => &copy::Copy,
            (FreezeKind::Stop, _) => &stop::Stop,
        }
    }
}

impl fmt::Display for FreezeKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for FreezeKind {
    type Err = FreezeError;

    fn from_str(word: &str) -> Result<FreezeKind, FreezeError> {
        let found = FreezeKind::ALL
            .into_iter()
            .find(|kind| kind.as_str() == word);
        found.ok_or_else(|| FreezeError::Unknown {
            word: word.to_owned(),
        })
    }
}

/// Why memory could not be frozen.
#[derive(Debug, Error)]
pub enum FreezeError {
    /// Not a word for a freeze.
    #[error("{word:?} is no freeze: auto, remap, copy and stop are (all give memory mode cow)")]
    Unknown {
        /// What was asked.
        word: String,
    },
    /// `Remap` of a VM that maps its memory privately: its own writes would be thrown away.
    #[error(
        "remap needs a VM that still maps its memory shared, and this one is a clone or was \
         remapped by an earlier fork: use freeze copy, or auto"
    )]
    AlreadyPrivate,
    /// A memory call failed.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}
