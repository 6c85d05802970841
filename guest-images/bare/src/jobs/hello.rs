//! `hello`: says what machine this is.

use crate::args::Args;
use crate::jobs::OK;
use crate::machine::Machine;
use crate::{println, smp};

/// Prints the number of vCPUs and the RAM.
pub fn run(machine: &Machine, _args: Args<'_>) -> u32 {
    println!("hello from {} vCPUs and {} MiB", smp::count(), machine.ram_mib());
    OK
}
