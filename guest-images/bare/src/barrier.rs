//! A place where all vCPUs wait for each other, as often as they like.

use core::hint::spin_loop;
use core::sync::atomic::{AtomicU32, Ordering};

/// A barrier for a fixed number of vCPUs, which spin.
pub struct Barrier {
    vcpus: u32,
    arrived: AtomicU32,
}

impl Barrier {
    /// A barrier for `vcpus` vCPUs.
    pub fn new(vcpus: usize) -> Barrier {
        Barrier {
            vcpus: vcpus as u32,
            arrived: AtomicU32::new(0),
        }
    }

    /// Returns when all vCPUs have called this equally often.
    pub fn wait(&self) {
        let before = self.arrived.fetch_add(1, Ordering::AcqRel);
        let round = before / self.vcpus;
        while self.arrived.load(Ordering::Acquire) / self.vcpus == round {
            spin_loop();
        }
    }
}
