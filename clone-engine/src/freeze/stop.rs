//! `Stop`: the parent does not run on.

use std::sync::Arc;

use forkvm_vmm::{PausedVm, Vm};

use super::{Freeze, FreezeError, FreezeKind, ParentMemory, copy::Copy};
use crate::image::{EmptyImage, MemoryImage};

/// See [`FreezeKind::Stop`]. Free for a VM that maps its memfd shared: that is the image. The
/// memory of a private one is taken as by `Delta`, but needs no protection: nobody writes it any
/// more, and what the image still misses when the VM is torn down is brought then.
pub(super) struct Stop;

impl Freeze for Stop {
    fn kind(&self) -> FreezeKind {
        FreezeKind::Stop
    }

    fn prepare(
        &self,
        vm: &Vm,
        parent: &ParentMemory<'_>,
    ) -> Result<Option<EmptyImage>, FreezeError> {
        let private = vm.ram().backing().shared().is_none();
        if private && parent.faults.shard().is_err() {
            return Copy.prepare(vm, parent);
        }
        parent.memory.complete_feeds();
        let len = vm.ram().layout().len();
        Ok(if private {
            Some(parent.faults.empty_image(len)?)
        } else {
            None
        })
    }

    fn freeze(
        &self,
        vm: &mut PausedVm<'_>,
        parent: &ParentMemory<'_>,
        prepared: Option<EmptyImage>,
    ) -> Result<Arc<MemoryImage>, FreezeError> {
        if let Some(file) = vm.ram().backing().shared() {
            return Ok(MemoryImage::whole(file.clone(), vm.ram().layout().len()));
        }
        if prepared.is_none() {
            return Copy.freeze(vm, parent, None);
        }
        let written = vm.ram().own_pages()?;
        let table = parent.memory.table()?.ok_or(FreezeError::Shared)?;
        parent.feed(prepared, table.with_own(&written), None)
    }

    fn parent_goes_on(&self) -> bool {
        false
    }
}
