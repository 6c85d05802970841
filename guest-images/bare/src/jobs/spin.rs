//! `spin`: every vCPU increments a counter of its own, for ever. Something to pause.

use core::hint::black_box;

use forkvm_abi::doorbell::report;

use crate::args::Args;
use crate::jobs::OK;
use crate::machine::Machine;
use crate::smp;

/// Reports READY and spins; never returns.
pub fn run(machine: &Machine, _args: Args<'_>) -> u32 {
    machine.doorbell().report(report::READY);
    smp::run_on_all(&|_cpu| {
        let mut counter = 0u64;
        loop {
            counter = black_box(counter + 1);
        }
    });
    OK
}
