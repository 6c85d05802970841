//! `triple-fault n=2`: forks into `n` clones; in the first, the last vCPU ends in a triple fault.
//!
//! The other clones exit 0 when `q` arrives on their console; the parent exits with the joined
//! status.

use core::hint::spin_loop;

use crate::args::Args;
use crate::jobs::OK;
use crate::machine::Machine;
use crate::{ring0, serial, smp};

/// Forks, and goes down or waits.
pub fn run(machine: &Machine, args: Args<'_>) -> u32 {
    let forked = machine.fork(0, args.number("n", 2) as u32);
    match forked.id {
        0 => machine.join(0, forked),
        1 => {
            smp::run_on_all(&|cpu| {
                if cpu == smp::count() - 1 {
                    ring0::triple_fault();
                }
                loop {
                    spin_loop();
                }
            });
            OK
        }
        _ => {
            while serial::read() != Some(b'q') {}
            OK
        }
    }
}
