//! `WriteProtect`: the parent goes on in its own memory, and writes wait for the image.

use std::sync::Arc;

use forkvm_vmm::{PausedVm, Vm};

use super::{Freeze, FreezeError, FreezeKind, ParentMemory};
use crate::image::{EmptyImage, MemoryImage, OwnerTable};

/// See [`FreezeKind::WriteProtect`]. The pause is bought with populated memory, whose page tables the
/// kernel walks, and with the number of extents that it is in.
pub(super) struct WriteProtect;

impl Freeze for WriteProtect {
    fn kind(&self) -> FreezeKind {
        FreezeKind::WriteProtect
    }

    fn prepare(
        &self,
        vm: &Vm,
        parent: &ParentMemory<'_>,
    ) -> Result<Option<EmptyImage>, FreezeError> {
        Ok(Some(parent.empty_image(vm)?))
    }

    fn freeze(
        &self,
        vm: &mut PausedVm<'_>,
        parent: &ParentMemory<'_>,
        prepared: Option<EmptyImage>,
    ) -> Result<Arc<MemoryImage>, FreezeError> {
        if vm.ram().backing().shared().is_none() {
            return Err(FreezeError::Private);
        }
        let populated = vm.ram().populated()?;
        let table = OwnerTable::own(vm.ram().layout().len(), &populated);
        parent.feed(prepared, table, Some(&populated))
    }
}
