//! `Remap`: the parent's memfd becomes the image, the parent goes on in a private mapping of it.

use std::sync::Arc;

use forkvm_vmm::{Backing, PausedVm, Vm};

use super::{Freeze, FreezeError, FreezeKind, ParentMemory};
use crate::image::{EmptyImage, MemoryImage};

/// See [`FreezeKind::Remap`]. The pause is bought with the page tables of what is mapped, which the
/// kernel tears down; nothing is copied.
pub(super) struct Remap;

impl Freeze for Remap {
    fn kind(&self) -> FreezeKind {
        FreezeKind::Remap
    }

    fn prepare(
        &self,
        _vm: &Vm,
        parent: &ParentMemory<'_>,
    ) -> Result<Option<EmptyImage>, FreezeError> {
        // Earlier images take their pages from the mapping that goes.
        parent.memory.complete_feeds();
        Ok(None)
    }

    fn freeze(
        &self,
        vm: &mut PausedVm<'_>,
        parent: &ParentMemory<'_>,
        _prepared: Option<EmptyImage>,
    ) -> Result<Arc<MemoryImage>, FreezeError> {
        let Backing::Shared(file) = vm.ram().backing().clone() else {
            return Err(FreezeError::AlreadyPrivate);
        };
        let private = Backing::Private(Arc::new(file.clone()));
        if let Err(error) = vm.ram_mut().remap(private) {
            // Some regions may be private by now; nothing was written to them yet.
            if let Err(worse) = vm.ram_mut().remap(Backing::Shared(file)) {
                parent.memory.lose_all(&worse);
            }
            return Err(error.into());
        }
        let image = MemoryImage::whole(file, vm.ram().layout().len());
        parent.memory.remapped(Some(&image));
        Ok(image)
    }

    fn thaw(
        &self,
        vm: &mut PausedVm<'_>,
        parent: &ParentMemory<'_>,
        image: Arc<MemoryImage>,
    ) -> Result<(), FreezeError> {
        let shared = Backing::Shared(image.file().clone());
        if let Err(error) = vm.ram_mut().remap(shared) {
            parent.memory.lose_all(&error);
            return Err(error.into());
        }
        parent.memory.remapped(None);
        Ok(())
    }
}
