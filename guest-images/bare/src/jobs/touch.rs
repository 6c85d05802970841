//! `touch mib=16 pattern=seq|stride|random seed=1 idle=0 redirty=0`: memory for a host's fork to carry over.
//!
//! Writes `mib` MiB, reports READY and halts. When the fork count changes, in the parent as in the
//! clones, it checks every word; with `idle=1` only when it changes once more. `seq` writes consecutive pages; `stride` every other page of a
//! range twice as long; `random` one of every two neighbours, by the seed. With `redirty=N` the first
//! N MiB are written once more after the first fork, and READY reported again.

use forkvm_abi::doorbell::report;

use crate::args::Args;
use crate::jobs::{OK, USAGE, WRONG};
use crate::machine::Machine;
use crate::pages::{self, Page};
use crate::{println, random};

/// Writes, waits for a fork, verifies.
pub fn run(machine: &Machine, args: Args<'_>) -> u32 {
    let doorbell = machine.doorbell();
    let seed = args.number("seed", 1);
    let count = args.number("mib", 16) as usize * pages::PER_MIB;
    let Some(pattern) = Pattern::parse(args.text("pattern").unwrap_or("seq")) else {
        println!("pattern is one of seq, stride, random");
        return USAGE;
    };
    let memory = pages::allocate(count * pattern.spread());
    let page = |number: usize| -> &Page { &memory[pattern.place(number, seed)] };
    (0..count).for_each(|number| page(number).fill(seed, number as u64));

    let before = doorbell.fork_count();
    doorbell.want_interrupt();
    doorbell.report(report::READY);
    doorbell.wait_for_fork(before);
    doorbell.report_action_of_clone();
    let again = args.number("redirty", 0) as usize * pages::PER_MIB;
    if again > 0 {
        (0..again.min(count)).for_each(|number| page(number).fill(seed, number as u64));
        doorbell.report(report::READY);
    }
    if args.flag("idle") {
        doorbell.wait_for_fork(doorbell.fork_count());
    }

    let mut checksum = 0u64;
    for number in 0..count {
        match page(number).check(seed, number as u64) {
            Ok(sum) => checksum = checksum.wrapping_add(sum),
            Err(word) => {
                println!("wrong: touch: page {number} word {word} changed");
                return WRONG;
            }
        }
    }
    let (clone, fork) = (doorbell.clone_id(), doorbell.fork_count());
    println!("touch ok pages={count} checksum={checksum:#018x} clone={clone} fork={fork}");
    OK
}

#[derive(Clone, Copy)]
enum Pattern {
    Sequential,
    Stride,
    Random,
}

impl Pattern {
    fn parse(name: &str) -> Option<Pattern> {
        match name {
            "seq" => Some(Pattern::Sequential),
            "stride" => Some(Pattern::Stride),
            "random" => Some(Pattern::Random),
            _ => None,
        }
    }

    /// How many times longer the range is than what is written of it.
    fn spread(self) -> usize {
        if matches!(self, Pattern::Sequential) {
            1
        } else {
            2
        }
    }

    /// Where in the range page `number` lies.
    fn place(self, number: usize, seed: u64) -> usize {
        match self {
            Pattern::Sequential => number,
            Pattern::Stride => 2 * number,
            Pattern::Random => 2 * number + (random::mix(seed ^ number as u64) & 1) as usize,
        }
    }
}
