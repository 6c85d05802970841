//! One pass over a virtqueue: available requests are served and returned.

use std::sync::atomic::Ordering;

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Error, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use crate::virtio::Chain;
use crate::{Brake, GuestMemory};

/// What a pass leaves to do.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pass {
    /// Requests that were returned.
    pub(super) returned: u16,
    /// The driver wants an interrupt now.
    pub(super) interrupt: bool,
    pub(super) end: PassEnd,
}

/// Why a pass ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PassEnd {
    /// Nothing was available any more, and the driver notifies the next request; or the device has no
    /// use for what is.
    Drained,
    /// It has returned as many requests as the queue holds, and more may be available.
    Bound,
    /// The brake is pulled, and more may be available.
    Braked,
    /// The machine is condemned: what the rings said counts no more.
    Condemned,
}

/// What a pass does with the requests of its queue.
pub(super) trait Server {
    /// Whether there is a use for a request now. What is not taken stays in the ring, untouched.
    fn takes(&self) -> bool;

    /// Serves a request and returns how many bytes it wrote.
    fn serve(&mut self, request: Chain) -> u32;
}

/// Serves what is available in `queue` with `server`, as long as it takes requests: at
/// most as many as the queue holds, and none once `brake` is pulled. Writes nothing to
/// guest memory when nothing is taken. An error means that the driver broke the queue, and it
/// can only be reset.
///
/// Each access to guest memory may wait for a page. Where the machine is condemned meanwhile, the
/// pass ends at once, whatever the rings hold: no request is begun or returned, none is an error.
pub(super) fn serve_available(
    queue: &mut Queue,
    memory: &GuestMemory,
    brake: &Brake,
    server: &mut impl Server,
) -> Result<Pass, Error> {
    let pass = serve_until_end(queue, memory, brake, server);
    // After the last look into the rings: what they said decides on interrupt and error.
    if brake.condemned() {
        return Ok(Pass {
            returned: 0,
            interrupt: false,
            end: PassEnd::Condemned,
        });
    }
    pass
}

fn serve_until_end(
    queue: &mut Queue,
    memory: &GuestMemory,
    brake: &Brake,
    server: &mut impl Server,
) -> Result<Pass, Error> {
    // Requests returned so far, and how many of them the driver's avail event accounts for.
    let (mut returned, mut accounted) = (0, 0);
    let end = loop {
        let stop = if !server.takes() {
            // First: a device that has no use for requests leaves none over.
            Some(PassEnd::Drained)
        } else if brake.pulled() {
            Some(PassEnd::Braked)
        } else {
            (returned == queue.size()).then_some(PassEnd::Bound)
        };
        if stop.is_none()
            && let Some(chain) = queue.iter(memory)?.next()
        {
            let head = chain.head_index();
            if head >= queue.size() {
                return Err(Error::InvalidDescriptorIndex);
            }
            let request = Chain::collect(chain, queue.size(), memory);
            if brake.condemned() {
                break PassEnd::Condemned;
            }
            let written = server.serve(request);
            if brake.condemned() {
                break PassEnd::Condemned;
            }
            queue.add_used(memory, head, written)?;
            returned += 1;
            continue;
        }
        if returned == accounted {
            break stop.unwrap_or(PassEnd::Drained);
        }
        // The driver may have added a request after the last look and, trusting the avail event
        // of the pass before, not said so: look again once the new event is written.
        let more = queue.enable_notification(memory)?;
        accounted = returned;
        match stop {
            _ if !more => break PassEnd::Drained,
            Some(end) => break end,
            None => {}
        }
    };
    let interrupt = returned > 0 && wants_interrupt(queue, memory)?;
    Ok(Pass {
        returned,
        interrupt,
        end,
    })
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
