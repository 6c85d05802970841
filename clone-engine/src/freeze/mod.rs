//! How a parent's memory becomes an image.
//!
//! A `Freeze` works on a paused VM. What it returns is undone by `Freeze::thaw` as long as the
//! VM has not run on, so that a later phase may fail. What needs no pause is done before it
//! (`Freeze::prepare`).

mod copy;
mod delta;
mod remap;
mod stop;
#[cfg(test)]
mod tests;
mod write_protect;

use std::fmt;
use std::ops::Range;
use std::str::FromStr;
use std::sync::Arc;

use forkvm_vmm::{Backing, MemoryError, PausedVm, Vm};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::fault::FaultHandler;
use crate::fork::MemoryMode;
use crate::image::{EmptyImage, MemoryImage, OwnerTable, StoreError};
use crate::source::SourceError;
use crate::source::live_parent::LiveParent;
use crate::userfault::UserfaultError;
use crate::vm_memory::VmMemory;

/// A way to keep the memory of an instant.
pub(crate) trait Freeze: Send + Sync {
    /// Which one it is; never [`FreezeKind::Auto`].
    fn kind(&self) -> FreezeKind;

    /// What can be done while the VM runs. What it returns is for [`freeze`](Freeze::freeze).
    fn prepare(
        &self,
        vm: &Vm,
        parent: &ParentMemory<'_>,
    ) -> Result<Option<EmptyImage>, FreezeError>;

    /// Keeps the memory of `vm` as it is now. On an error the VM's memory is as it was.
    fn freeze(
        &self,
        vm: &mut PausedVm<'_>,
        parent: &ParentMemory<'_>,
        prepared: Option<EmptyImage>,
    ) -> Result<Arc<MemoryImage>, FreezeError>;

    /// Undoes [`freeze`](Freeze::freeze) on the same pause.
    fn thaw(
        &self,
        _vm: &mut PausedVm<'_>,
        parent: &ParentMemory<'_>,
        image: Arc<MemoryImage>,
    ) -> Result<(), FreezeError> {
        parent.memory.unfeed(&image);
        Ok(())
    }

    /// Whether the parent may run on afterwards.
    fn parent_goes_on(&self) -> bool {
        true
    }
}

/// The memory that is frozen, as the engine knows it.
pub(crate) struct ParentMemory<'a> {
    pub(crate) memory: &'a Arc<VmMemory>,
    pub(crate) faults: &'a FaultHandler,
}

impl ParentMemory<'_> {
    /// The image of this instant, of which the VM feeds what is the table's own. With `protect` it
    /// may run on.
    fn feed(
        &self,
        prepared: Option<EmptyImage>,
        table: OwnerTable,
        protect: Option<&[Range<u64>]>,
    ) -> Result<Arc<MemoryImage>, FreezeError> {
        let empty = match prepared {
            Some(empty) => empty,
            None => self.faults.empty_image(table.len())?,
        };
        let live = Arc::new(LiveParent::new(self.memory.clone()));
        let source = self.faults.source(live);
        let image = self
            .memory
            .feed(self.faults, empty, table, source, protect)?;
        self.faults.look_after(&image);
        Ok(image)
    }

    /// An image that the VM will feed, with the room for it.
    fn empty_image(&self, vm: &Vm) -> Result<EmptyImage, FreezeError> {
        self.memory.make_room();
        Ok(self.faults.empty_image(vm.ram().layout().len())?)
    }

    /// Brings all that the images under it miss, with the VM running.
    fn complete_images(&self) -> Result<(), FreezeError> {
        Ok(self.memory.complete()?)
    }
}

/// The word for a `Freeze`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FreezeKind {
    /// What serves the memory mode, and is cheapest: see `FreezeKind::choose`.
    #[default]
    Auto,
    /// The parent's own memfd becomes the image and the parent goes on in a private mapping of it:
    /// nothing is copied. Once per VM, while it still maps its memfd shared.
    Remap,
    /// The parent goes on in its own memfd, write-protected; a page is copied into the image before
    /// it is written or when a clone asks. As long as the VM maps its memfd shared.
    WriteProtect,
    /// The same for a VM that maps its memory privately, a clone or a remapped parent: only the
    /// pages that it has written itself are protected, the others are in earlier images already.
    Delta,
    /// Populated memory is copied during the pause. Always possible, at any depth.
    Copy,
    /// The parent does not run on; its memory is the image.
    Stop,
}

impl FreezeKind {
    /// All words, for help texts and tests.
    pub const ALL: [FreezeKind; 6] = [
        FreezeKind::Auto,
        FreezeKind::Remap,
        FreezeKind::WriteProtect,
        FreezeKind::Delta,
        FreezeKind::Copy,
        FreezeKind::Stop,
    ];

    /// The word in options and outputs.
    pub fn as_str(self) -> &'static str {
        match self {
            FreezeKind::Auto => "auto",
            FreezeKind::Remap => "remap",
            FreezeKind::WriteProtect => "write-protect",
            FreezeKind::Delta => "delta",
            FreezeKind::Copy => "copy",
            FreezeKind::Stop => "stop",
        }
    }

    /// The memory modes that clones of such an image can have.
    pub fn serves(self) -> &'static [MemoryMode] {
        match self {
            FreezeKind::Remap | FreezeKind::Copy => &[MemoryMode::Cow],
            FreezeKind::WriteProtect => &[MemoryMode::Lazy],
            FreezeKind::Auto | FreezeKind::Delta | FreezeKind::Stop => {
                &[MemoryMode::Cow, MemoryMode::Lazy]
            }
        }
    }

    /// Refuses a pair that does not exist.
    pub fn check(self, mode: MemoryMode) -> Result<(), FreezeError> {
        if self.serves().contains(&mode) {
            Ok(())
        } else {
            Err(FreezeError::Pair { freeze: self, mode })
        }
    }

    /// The way itself for a parent whose memory hangs on `backing`, and why it was chosen. `lazy` is
    /// whether this host has what lazy memory needs.
    pub(crate) fn choose(
        self,
        backing: &Backing,
        mode: MemoryMode,
        lazy: impl FnOnce() -> bool,
    ) -> Result<(&'static dyn Freeze, &'static str), FreezeError> {
        self.check(mode)?;
        let private = backing.shared().is_none();
        let asked = "it was asked for";
        Ok(match (self, mode, private) {
            (FreezeKind::Remap, _, true) => return Err(FreezeError::AlreadyPrivate),
            (FreezeKind::WriteProtect, _, true) => return Err(FreezeError::Private),
            (FreezeKind::Delta, _, false) => return Err(FreezeError::Shared),
            (FreezeKind::Remap, ..) => (&remap::Remap, asked),
            (FreezeKind::WriteProtect, ..) => (&write_protect::WriteProtect, asked),
            (FreezeKind::Delta, ..) => (&delta::Delta, asked),
            (FreezeKind::Copy, ..) => (&copy::Copy, asked),
            (FreezeKind::Stop, ..) => (&stop::Stop, asked),
            (FreezeKind::Auto, MemoryMode::Cow, false) => (
                &remap::Remap,
                "the first fork of a VM that maps its memory shared copies nothing",
            ),
            (FreezeKind::Auto, MemoryMode::Lazy, false) => (
                &write_protect::WriteProtect,
                "clones are lazy and the VM maps its memory shared",
            ),
            (FreezeKind::Auto, MemoryMode::Cow, true) if !lazy() => (
                &copy::Copy,
                "the VM maps its memory privately and there is no userfaultfd for kernel mode",
            ),
            (FreezeKind::Auto, _, true) => (
                &delta::Delta,
                "the VM maps its memory privately: only what it has written is looked at",
            ),
        })
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

/// The pairs of freeze and memory mode that exist, for messages.
const PAIRS: &str = "remap and copy give memory mode cow, write-protect gives lazy, delta and stop \
                     give either, auto chooses";

/// Why memory could not be frozen.
#[derive(Debug, Error)]
pub enum FreezeError {
    /// Not a word for a freeze.
    #[error("{word:?} is no freeze: {PAIRS}")]
    Unknown {
        /// What was asked.
        word: String,
    },
    /// A freeze cannot serve a memory mode.
    #[error("freeze {freeze} does not give memory mode {}: {PAIRS}", mode.as_str())]
    Pair {
        /// The freeze.
        freeze: FreezeKind,
        /// The memory mode.
        mode: MemoryMode,
    },
    /// `Remap` of a VM that maps its memory privately: its own writes would be thrown away.
    #[error(
        "remap needs a VM that still maps its memory shared, and this one is a clone or was \
         remapped by an earlier fork: use freeze delta, copy or auto"
    )]
    AlreadyPrivate,
    /// `WriteProtect` of a VM that maps its memory privately.
    #[error(
        "write-protect needs a VM that still maps its memory shared, and this one is a clone or was \
         remapped by an earlier fork: use freeze delta or auto"
    )]
    Private,
    /// `Delta` of a VM that maps its memory shared: there is no earlier image.
    #[error(
        "delta needs a VM that maps its memory privately, a clone or one that was remapped, and \
         this one was booted and not remapped: use freeze remap, write-protect or auto"
    )]
    Shared,
    /// A memory call failed.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// An image could not be made.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A call on a userfaultfd failed.
    #[error(transparent)]
    Userfault(#[from] UserfaultError),
    /// Memory that an earlier image misses cannot be had.
    #[error(transparent)]
    Source(#[from] SourceError),
}
