//! One pass over a virtqueue: every available request is served and returned.

use std::sync::atomic::Ordering;

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Error, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use crate::GuestMemory;
use crate::virtio::Chain;

/// Serves what is available in `queue` with `serve`, which returns the number of bytes it wrote.
/// Returns whether the driver wants an interrupt now. Writes nothing to guest memory when nothing
/// is available. An error means that the driver broke the queue, and it can only be reset.
pub(super) fn serve_available(
    queue: &mut Queue,
    memory: &GuestMemory,
    mut serve: impl FnMut(Chain) -> u32,
) -> Result<bool, Error> {
    let mut returned_any = false;
    loop {
        let mut returned = false;
        while let Some(chain) = queue.iter(memory)?.next() {
            let head = chain.head_index();
            if head >= queue.size() {
                return Err(Error::InvalidDescriptorIndex);
            }
            let written = serve(Chain::collect(chain, queue.size(), memory));
            queue.add_used(memory, head, written)?;
            returned = true;
        }
        returned_any |= returned;
        // The driver may have added a request after the last look and, trusting the avail event
        // of the pass before, not said so: look again once the new event is written.
        if !returned || !queue.enable_notification(memory)? {
            break;
        }
    }
    Ok(returned_any && wants_interrupt(queue, memory)?)
}

/// virtio 1.2 section 2.7.7: the avail ring's flag without EVENT_IDX, its used_event with it.
fn wants_interrupt(queue: &mut Queue, memory: &GuestMemory) -> Result<bool, Error> {
    if queue.event_idx_enabled() {
        return queue.needs_notification(memory);
    }
    let flags = memory
        .load::<u16>(GuestAddress(queue.avail_ring()), Ordering::Acquire)
        .map_err(Error::GuestMemory)?;
    Ok(u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0)
}
