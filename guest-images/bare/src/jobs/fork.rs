//! `fork n=1 mib=0 tries=1`: forks itself into `n` clones, with `mib` MiB of memory written before.
//!
//! Clone i exits with status i; the parent joins them and exits with what the join answered, which
//! is the highest number of a clone. A fork that the host refuses is asked for again up to `tries`
//! times in all; each refusal is reported as USER + error number, once the memory was verified.

use forkvm_abi::doorbell::report;

use crate::args::Args;
use crate::doorbell::Forked;
use crate::jobs::WRONG;
use crate::machine::{self, Machine};
use crate::pages::{self, Page};
use crate::println;

const SEED: u64 = 1;

/// Forks, says who it is, and ends with its number or with the joined status.
pub fn run(machine: &Machine, args: Args<'_>) -> u32 {
    let clones = args.number("n", 1) as u32;
    let memory = pages::allocate(args.number("mib", 0) as usize * pages::PER_MIB);
    memory
        .iter()
        .zip(0..)
        .for_each(|(page, number)| page.fill(SEED, number));

    let forked = fork(machine, clones, args.number("tries", 1), memory);
    if !intact(memory) {
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

/// Forks at the latest at the last of `tries`.
fn fork(machine: &Machine, clones: u32, tries: u64, memory: &[Page]) -> Forked {
    for _ in 1..tries {
        match machine.doorbell().fork(0, clones) {
            Ok(forked) => return forked,
            Err(error) => {
                if !intact(memory) {
                    println!("wrong: memory changed at a fork that was refused");
                    machine::exit(WRONG);
                }
                machine
                    .doorbell()
                    .report(report::USER + error.unsigned_abs() as u32);
            }
        }
    }
    machine.fork(0, clones)
}

fn intact(memory: &[Page]) -> bool {
    memory
        .iter()
        .zip(0..)
        .all(|(page, number)| page.check(SEED, number).is_ok())
}
