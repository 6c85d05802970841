//! `save mib=4`: asks the host to save the machine, and says which of the two it is afterwards.

use crate::args::Args;
use crate::jobs::{OK, WRONG};
use crate::machine::Machine;
use crate::{pages, println};

const SEED: u64 = 2;

/// Writes memory, has it saved, verifies it.
pub fn run(machine: &Machine, args: Args<'_>) -> u32 {
    let memory = pages::allocate(args.number("mib", 4) as usize * pages::PER_MIB);
    memory
        .iter()
        .zip(0..)
        .for_each(|(page, number)| page.fill(SEED, number));
    let restored = machine.save(0);
    if memory
        .iter()
        .zip(0..)
        .any(|(page, number)| page.check(SEED, number).is_err())
    {
        println!("wrong: memory changed at the save");
        return WRONG;
    }
    println!("{}", if restored { "restored" } else { "saved" });
    OK
}
