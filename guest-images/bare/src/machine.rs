//! The machine that a job runs on, and how it ends.

use forkvm_abi::EXIT_PORT;

use crate::boot_info::BootInfo;
use crate::doorbell::Doorbell;
use crate::port;
use crate::ring0;
use core::sync::atomic::AtomicU32;

/// What a job can use.
pub struct Machine {
    ram_mib: u64,
    doorbell: Option<Doorbell>,
}

impl Machine {
    /// The machine that `boot` describes.
    pub fn new(boot: &BootInfo, doorbell: Option<Doorbell>) -> Machine {
        Machine { ram_mib: boot.ram_mib(), doorbell }
    }

    /// RAM in MiB.
    pub fn ram_mib(&self) -> u64 {
        self.ram_mib
    }

    /// The fork doorbell; `None` on a host that is not forkvm.
    pub fn doorbell(&self) -> Option<&Doorbell> {
        self.doorbell.as_ref()
    }
}

/// Ends the machine with `status`.
pub fn exit(status: u32) -> ! {
    port::write32(EXIT_PORT, status);
    // A host without an exit device: nothing is left to do.
    let forever = AtomicU32::new(0);
    loop {
        ring0::wait_while(&forever, 0);
    }
}
