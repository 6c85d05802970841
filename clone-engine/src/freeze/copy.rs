//! `Copy`: the eager baseline.

use std::sync::Arc;

use forkvm_vmm::{PausedVm, Vm, memory};

use super::{Freeze, FreezeError, FreezeKind, ParentMemory};
use crate::image::{EmptyImage, MemoryImage};

/// See [`FreezeKind::Copy`]. The pause is bought with populated memory.
pub(super) struct Copy;

impl Freeze for Copy {
    fn kind(&self) -> FreezeKind {
        FreezeKind::Copy
    }

    fn prepare(
        &self,
        _vm: &Vm,
        parent: &ParentMemory<'_>,
    ) -> Result<Option<EmptyImage>, FreezeError> {
        // What it has not touched is copied as well, and would be fetched in the pause.
        parent.complete_images()?;
        Ok(None)
    }

    fn freeze(
        &self,
        vm: &mut PausedVm<'_>,
        _parent: &ParentMemory<'_>,
        _prepared: Option<EmptyImage>,
    ) -> Result<Arc<MemoryImage>, FreezeError> {
        let len = vm.ram().layout().len();
        // Nobody maps it yet, so it may be written like any file.
        let file = memory::memfd(c"forkvm-image", len)?;
        let bytes = vm.ram().copy_populated(&file)?;
        tracing::debug!(bytes, "copied");
        Ok(MemoryImage::whole(Arc::new(file), len))
    }
}
