//! `Remap`: the parent's memfd becomes the image, the parent goes on in a private mapping of it.

use forkvm_vmm::{Backing, PausedVm};

use super::{Freeze, FreezeError, FreezeKind};
use crate::image::ImageBuilder;

/// See [`FreezeKind::Remap`]. The pause is bought with the page tables of what is mapped, which the
/// kernel tears down; nothing is copied.
pub(super) struct Remap;

impl Freeze for Remap {
    fn kind(&self) -> FreezeKind {
        FreezeKind::Remap
    }

    fn freeze(&self, vm: &mut PausedVm<'_>) -> Result<ImageBuilder, FreezeError> {
        let Backing::Shared(file) = vm.ram().backing().clone() else {
            return Err(FreezeError::AlreadyPrivate);
        };
        if let Err(error) = vm.ram_mut().remap(Backing::Private(file.clone())) {
            // Some regions may be private by now; nothing was written to them yet.
            vm.ram_mut().remap(Backing::Shared(file))?;
            return Err(error.into());
        }
        Ok(ImageBuilder::adopt(file))
    }

    fn thaw(&self, vm: &mut PausedVm<'_>, image: ImageBuilder) -> Result<(), FreezeError> {
        drop(image);
        let file = vm.ram().backing().file().clone();
        Ok(vm.ram_mut().remap(Backing::Shared(file))?)
    }

    fn parent_goes_on(&self) -> bool {
        true
    }
}
