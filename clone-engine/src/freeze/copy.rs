//! `Copy`: the eager baseline.

use forkvm_vmm::PausedVm;

use super::{Freeze, FreezeError, FreezeKind};
use crate::image::ImageBuilder;

/// See [`FreezeKind::Copy`]. The pause is bought with populated memory.
pub(super) struct Copy;

impl Freeze for Copy {
    fn kind(&self) -> FreezeKind {
        FreezeKind::Copy
    }

    fn freeze(&self, vm: &mut PausedVm<'_>) -> Result<ImageBuilder, FreezeError> {
        let image = ImageBuilder::empty(vm.ram().layout().len())?;
        let bytes = image.fill(vm.ram())?;
        tracing::debug!(bytes, "copied");
        Ok(image)
    }

    fn thaw(&self, _vm: &mut PausedVm<'_>, image: ImageBuilder) -> Result<(), FreezeError> {
        drop(image);
        Ok(())
    }

    fn parent_goes_on(&self) -> bool {
        true
    }
}
