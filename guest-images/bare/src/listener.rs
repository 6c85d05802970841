//! Who hears how far a job is: the fork doorbell, or the console where a host has none (QEMU).
//!
//! For jobs that also make sense in a VM that cannot be forked. On the console a report is a line:
//! READY, ACTION, ANSWER, or a number. Nothing else is different but that such a VM is never a clone.

use forkvm_abi::doorbell::report;

use crate::doorbell::Doorbell;
use crate::println;

/// See the module's text.
pub enum Listener<'a> {
    /// The host can fork this VM.
    Doorbell(&'a Doorbell),
    /// It cannot.
    Console,
}

impl Listener<'_> {
    /// Tells `value`; waits for nothing but the UART.
    pub fn report(&self, value: u32) {
        match self {
            Listener::Doorbell(doorbell) => doorbell.report(value),
            Listener::Console => match value {
                report::READY => println!("READY"),
                report::ACTION => println!("ACTION"),
                report::ANSWER => println!("ANSWER"),
                value => println!("{value}"),
            },
        }
    }

    /// Has forks of this VM interrupt it.
    pub fn want_interrupt(&self) {
        if let Listener::Doorbell(doorbell) = self {
            doorbell.want_interrupt();
        }
    }

    /// Forks between this VM and the boot.
    pub fn fork_count(&self) -> u32 {
        match self {
            Listener::Doorbell(doorbell) => doorbell.fork_count(),
            Listener::Console => 0,
        }
    }

    /// Whether this VM is a clone.
    pub fn is_clone(&self) -> bool {
        match self {
            Listener::Doorbell(doorbell) => doorbell.clone_id() != 0,
            Listener::Console => false,
        }
    }
}
