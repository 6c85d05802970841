//! `Delta`: only what a VM has written itself since it was forked, or remapped, is looked at.

use std::sync::Arc;

use forkvm_vmm::{PausedVm, Vm};

use super::{Freeze, FreezeError, FreezeKind, ParentMemory};
use crate::image::{EmptyImage, MemoryImage};

/// See [`FreezeKind::Delta`]. The pause is bought with the pages that the VM has written, and a scan
/// of its page tables.
pub(super) struct Delta;

impl Freeze for Delta {
    fn kind(&self) -> FreezeKind {
        FreezeKind::Delta
    }

    fn prepare(
        &self,
        vm: &Vm,
        parent: &ParentMemory<'_>,
    ) -> Result<Option<EmptyImage>, FreezeError> {
        // Known before the pause: of a remapped VM it has yet to be read from the memfd.
        parent.memory.table()?;
        Ok(Some(parent.empty_image(vm)?))
    }

    fn freeze(
        &self,
        vm: &mut PausedVm<'_>,
        parent: &ParentMemory<'_>,
        prepared: Option<EmptyImage>,
    ) -> Result<Arc<MemoryImage>, FreezeError> {
        let written = vm.ram().own_pages()?;
        let table = parent.memory.table()?.ok_or(FreezeError::Shared)?;
        parent.feed(prepared, table.with_own(&written), Some(&written))
    }
}
