//! The pages that a clone touches before anything else: brought before it is spawned.
//!
//! Each of them would cost a lazy clone a fault at its start, one after the other. They are the
//! pages that the registers of the saved vCPUs name, with the page tables on the way, and the
//! doorbell page, where the clone's answer is written.

use std::sync::Arc;

use forkvm_vmm::MachineState;

use crate::image::MemoryImage;
use crate::source::SourceError;

/// See the module's text.
pub(crate) struct FirstPages<'a> {
    pub(crate) state: &'a MachineState,
    /// Guest-physical address.
    pub(crate) doorbell: Option<u64>,
}

impl FirstPages<'_> {
    /// Brings them into `image`, waiting for those that are far.
    pub(crate) fn bring(&self, image: &Arc<MemoryImage>) -> Result<(), SourceError> {
        let layout = self.state.layout();
        let mut failed = Ok(());
        let mut read = |address: u64| -> Option<u64> {
            let offset = layout.offset_of(address)?;
            match image.read_word(offset) {
                Ok(word) => Some(word),
                Err(error) => {
                    failed = Err(error);
                    None
                }
            }
        };
        let pages = self.state.named_pages(&mut read);
        failed?;
        for address in pages.into_iter().chain(self.doorbell) {
            if let Some(offset) = layout.offset_of(address) {
                image.prefetch(offset)?;
            }
        }
        Ok(())
    }
}
