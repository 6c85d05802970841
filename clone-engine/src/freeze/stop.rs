//! `Stop`: the parent does not run on.

use forkvm_vmm::{Backing, PausedVm};

use super::{Freeze, FreezeError, FreezeKind, copy::Copy};
use crate::image::ImageBuilder;

/// See [`FreezeKind::Stop`]. Free for a VM that maps its memfd shared: that is the image. The
/// memory of a private one is spread over base and mapping and has to be brought together.
pub(super) struct Stop;

impl Freeze for Stop {
    fn kind(&self) -> FreezeKind {
        FreezeKind::Stop
    }

    fn freeze(&self, vm: &mut PausedVm<'_>) -> Result<ImageBuilder, FreezeError> {
        match vm.ram().backing() {
            Backing::Shared(file) => Ok(ImageBuilder::adopt(file.clone())),
            Backing::Private(_) => Copy.freeze(vm),
        }
    }

    fn thaw(&self, _vm: &mut PausedVm<'_>, image: ImageBuilder) -> Result<(), FreezeError> {
        drop(image);
        Ok(())
    }

    fn parent_goes_on(&self) -> bool {
        false
    }
}
