//! What a saved virtio device keeps of each of its queues.

use serde::{Deserialize, Serialize};
use virtio_queue::QueueState;

/// A split queue's state; the same fields as virtio-queue's, which has no serde.
#[derive(Clone, Copy, Serialize, Deserialize)]
pub(super) struct SavedQueue {
    max_size: u16,
    next_avail: u16,
    next_used: u16,
    event_idx_enabled: bool,
    size: u16,
    ready: bool,
    desc_table: u64,
    avail_ring: u64,
    used_ring: u64,
}

impl From<QueueState> for SavedQueue {
    fn from(state: QueueState) -> Self {
        SavedQueue {
            max_size: state.max_size,
            next_avail: state.next_avail,
            next_used: state.next_used,
            event_idx_enabled: state.event_idx_enabled,
            size: state.size,
            ready: state.ready,
            desc_table: state.desc_table,
            avail_ring: state.avail_ring,
            used_ring: state.used_ring,
        }
    }
}

impl From<SavedQueue> for QueueState {
    fn from(saved: SavedQueue) -> Self {
        QueueState {
            max_size: saved.max_size,
            next_avail: saved.next_avail,
            next_used: saved.next_used,
            event_idx_enabled: saved.event_idx_enabled,
            size: saved.size,
            ready: saved.ready,
            desc_table: saved.desc_table,
            avail_ring: saved.avail_ring,
            used_ring: saved.used_ring,
        }
    }
}
