//! The guest that every forkvm carries with it.

use forkvm_vmm::boot::Payload;

/// The freestanding guest, for `BootSpec::payload`. Its command line chooses a job: `job=NAME
/// key=value …`.
pub fn bare() -> Payload {
    Payload::Bytes(forkvm_guest_images::BARE)
}
