//! `fork n=1 mib=0`: forks itself into `n` clones, with `mib` MiB of memory written before.
//!
//! Clone i exits with status i; the parent joins them and exits with what the join answered, which
//! is the highest number of a clone.

use crate::args::Args;
use crate::jobs::WRONG;
use crate::machine::Machine;
use crate::{pages, println};

const SEED: u64 = 1;

/// Forks, says who it is, and ends with its number or with the joined status.
pub fn run(machine: &Machine, args: Args<'_>) -> u32 {
    let clones = args.number("n", 1) as u32;
    let memory = pages::allocate(args.number("mib", 0) as usize * pages::PER_MIB);
    memory
        .iter()
        .zip(0..)
        .for_each(|(page, number)| page.fill(SEED, number));

    let forked = machine.fork(0, clones);
    if memory
        .iter()
        .zip(0..)
        .any(|(page, number)| page.check(SEED, number).is_err())
    {
        println!("wrong: memory changed at the fork");
        return WRONG;
    }
    if forked.id != 0 {
        println!("clone {} of {}", forked.id, forked.granted);
        return forked.id;
    }
    println!("parent of {}", forked.granted);
    let status = machine.join(0, forked);
    println!("joined with status {status}");
    status
}
