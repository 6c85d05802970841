//! `tree depth=3 mib=1 stay=0`: a fork of a fork of a fork.
//!
//! Each generation writes `mib` MiB of its own, forks one clone, and joins it. Each verifies what
//! it and all its ancestors wrote, the clone before it forks and the parent after the join. A
//! status is the child's plus one, so the root ends with `depth`. With `stay=1` the last one halts instead
//! of ending, so that all others wait.

use alloc::vec::Vec;

use crate::args::Args;
use crate::machine::{self, Machine};
use crate::pages::{self, Page};
use crate::{interrupts, println};

/// Exit status of a generation that found something wrong: more than any depth.
const WRONG: u32 = 200;

/// Grows the tree and ends with the number of generations below this VM.
pub fn run(machine: &Machine, args: Args<'_>) -> u32 {
    let depth = args.number("depth", 3) as u32;
    let count = args.number("mib", 1) as usize * pages::PER_MIB;
    let mut written: Vec<&'static [Page]> = Vec::new();
    for generation in 0..depth {
        let memory = pages::allocate(count);
        memory
            .iter()
            .zip(0..)
            .for_each(|(page, at)| page.fill(u64::from(generation), at));
        written.push(memory);
        let forked = machine.fork(0, 1);
        verify(&written);
        if forked.id == 0 {
            let below = machine.join(0, forked);
            verify(&written);
            println!("generation {generation}: {below} below the child");
            return if below >= WRONG { below } else { below + 1 };
        }
    }
    if args.flag("stay") {
        interrupts::halt();
    }
    0
}

fn verify(written: &[&'static [Page]]) {
    for (memory, generation) in written.iter().zip(0..) {
        if memory
            .iter()
            .zip(0..)
            .any(|(page, at)| page.check(generation, at).is_err())
        {
            println!("wrong: tree: what generation {generation} wrote has changed");
            machine::exit(WRONG);
        }
    }
}
