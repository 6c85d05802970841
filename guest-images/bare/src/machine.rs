//! The machine that a job runs on, and how it ends.

use core::sync::atomic::AtomicU32;

use forkvm_abi::EXIT_PORT;

use crate::boot_info::BootInfo;
use crate::doorbell::{Doorbell, Forked};
use crate::listener::Listener;
use crate::pages::Page;
use crate::{port, println, ring0};

/// Exit status of a guest whose host cannot fork, join or save it now.
pub const REFUSED: u32 = 3;

/// What a job can use.
pub struct Machine {
    ram_mib: u64,
    doorbell: Option<Doorbell>,
}

impl Machine {
    /// The machine that `boot` describes.
    pub fn new(boot: &BootInfo, doorbell: Option<Doorbell>) -> Machine {
        Machine {
            ram_mib: boot.ram_mib(),
            doorbell,
        }
    }

    /// RAM in MiB.
    pub fn ram_mib(&self) -> u64 {
        self.ram_mib
    }

    /// The fork doorbell. On a host that has none the guest ends here, with [`REFUSED`].
    pub fn doorbell(&self) -> &Doorbell {
        self.doorbell.as_ref().unwrap_or_else(|| {
            println!("this host has no fork doorbell");
            exit(REFUSED)
        })
    }

    /// Who hears of a job that does not need the doorbell.
    pub fn listener(&self) -> Listener<'_> {
        match &self.doorbell {
            Some(doorbell) => Listener::Doorbell(doorbell),
            None => Listener::Console,
        }
    }

    /// [`Doorbell::fork`] by vCPU `cpu`. Where the host refuses, the guest ends with [`REFUSED`].
    pub fn fork(&self, cpu: usize, clones: u32) -> Forked {
        self.doorbell()
            .fork(cpu, clones)
            .unwrap_or_else(|error| refused("fork", error))
    }

    /// [`Doorbell::join`] by vCPU `cpu`. Where the host refuses, the guest ends with [`REFUSED`].
    pub fn join(&self, cpu: usize, forked: Forked) -> u32 {
        self.doorbell()
            .join(cpu, forked)
            .unwrap_or_else(|error| refused("join", error))
    }

    /// [`Doorbell::discard`] by vCPU `cpu`. Where the host refuses, the guest ends with [`REFUSED`].
    pub fn discard(&self, cpu: usize, pages: &[Page]) -> usize {
        self.doorbell()
            .discard(cpu, pages)
            .unwrap_or_else(|error| refused("discard", error))
    }

    /// [`Doorbell::save`] by vCPU `cpu`. Where the host refuses, the guest ends with [`REFUSED`].
    pub fn save(&self, cpu: usize) -> bool {
        self.doorbell()
            .save(cpu)
            .unwrap_or_else(|error| refused("save", error))
    }
}

fn refused(call: &str, error: i64) -> ! {
    println!("{call} failed with error {error}");
    exit(REFUSED)
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
