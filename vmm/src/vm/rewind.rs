//! Back to a state that the machine was in before, in place: the same KVM objects, threads and devices.
//!
//! Memory and what is behind the disks are the owner's, who puts both back before. What is here is all
//! that KVM and the devices hold besides.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use forkvm_devices::block::BlockLayer;

use super::{MachineState, PausedVm, VmError};
use crate::machine::lock;

impl PausedVm<'_> {
    /// Puts vCPUs, interrupt controllers and devices back to `state`, which this machine was started
    /// from; `disks` are what its disks were then, in the order of its configuration. Its clocks go on
    /// from where they stood in `state`, and the vCPUs hold no translation from before. Its memory must
    /// hold what it did then.
    ///
    /// A shadow MMU keeps translations all the same ([`Kvm::sees_rewritten_tables`]); there
    /// [`PausedVm::readd_slots`] goes before.
    ///
    /// The machine is as new: a vCPU that was held in a call goes on, the first KVM_RUN is told again
    /// ([`VmEvent::Running`](super::VmEvent::Running)), and calls that were pending at the save are so
    /// again. What its threads told before this returns was of the time before. On an error it must
    /// not run any more.
    ///
    /// [`Kvm::sees_rewritten_tables`]: crate::Kvm::sees_rewritten_tables
    pub fn rewind(
        &mut self,
        state: &MachineState,
        disks: &[Arc<dyn BlockLayer>],
    ) -> Result<(), VmError> {
        if *self.config() != state.config {
            let what = format!("the configuration {:?}", state.config);
            return Err(VmError::Shape { what });
        }
        for (device, layer) in self.disks().iter().zip(disks) {
            lock(device).model_mut().swap_layer(layer.clone());
        }
        self.inner.rewind(state)?;
        let objects = &self.inner.objects;
        objects.gate.release_all();
        objects.has_run.store(false, Ordering::Relaxed);
        // As at a start: a vCPU looks into the queues once. The brake is pulled, and stays so until the
        // machine runs.
        objects.brake.leave_over();
        Ok(())
    }

    /// Deletes all memory slots and adds them again, which takes milliseconds: KVM forgets what it
    /// derived from the guest's page tables.
    pub fn readd_slots(&mut self) -> Result<(), VmError> {
        self.inner.objects.readd_slots()
    }
}
