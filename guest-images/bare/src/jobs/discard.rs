//! `discard mib=16 count=64`: gives pages back to the host, and knows what all pages must hold.
//!
//! Fills `mib` MiB, gives `count` scattered pages and one longer run back, checks that they read as
//! zero and that no other page changed, rewrites half of them, checks again, and reports READY.
//! When the fork count changes it checks all pages (zero, rewritten, never given back) and reports
//! USER. A clone then gives back other pages in the same way, and reports USER + 1. Then it halts
//! until the next fork. A page that the host does not take back is wrong here: nothing touches it.
//! Exit status 1: the console says what differs. Only the first vCPU works.

use core::ops::Range;

use alloc::vec;
use alloc::vec::Vec;

use forkvm_abi::doorbell::report;

use crate::args::Args;
use crate::jobs::{USAGE, WRONG};
use crate::machine::{self, Machine};
use crate::pages::{self, Page};
use crate::println;
use crate::random::mix;
use crate::scatter::Scatter;

/// Seed of what the pages hold at first.
const FIRST: u64 = 1;
/// In the place of a seed: the page is zero.
const ZERO: u64 = 0;
/// The run is this part of all pages.
const RUN_PART: usize = 8;

/// Gives pages back and checks, at boot and after every fork.
pub fn run(machine: &Machine, args: Args<'_>) -> u32 {
    let doorbell = machine.doorbell();
    let (mib, count) = (args.number("mib", 16), args.number("count", 64) as usize);
    if mib == 0 {
        println!("discard mib=M: at least 1");
        return USAGE;
    }
    let mut area = Area::new(machine, mib as usize * pages::PER_MIB);
    area.give_some_back(count);
    let mut seen = doorbell.fork_count();
    doorbell.want_interrupt();
    doorbell.report(report::READY);
    loop {
        doorbell.wait_for_fork(seen);
        seen = doorbell.fork_count();
        let is_clone = doorbell.clone_id() != 0;
        doorbell.report_action_of_clone();
        area.check("after a fork");
        doorbell.report(report::USER);
        if is_clone {
            area.give_some_back(count);
            doorbell.report(report::USER + 1);
        }
    }
}

/// Pages, and what they must hold.
struct Area<'a> {
    machine: &'a Machine,
    pages: &'static [Page],
    /// For each page the seed of its content, or [`ZERO`].
    holds: Vec<u64>,
    scatter: Scatter,
    /// How many places of `scatter` were used.
    used: usize,
}

impl<'a> Area<'a> {
    /// `count` pages, filled.
    fn new(machine: &'a Machine, count: usize) -> Area<'a> {
        let mut area = Area {
            machine,
            pages: pages::allocate_chunks(count),
            holds: vec![ZERO; count],
            scatter: Scatter::new(count),
            used: 0,
        };
        (0..count).for_each(|number| area.fill(number, FIRST));
        area
    }

    fn fill(&mut self, number: usize, seed: u64) {
        self.pages[number].fill(seed, number as u64);
        self.holds[number] = seed;
    }

    /// Gives `count` scattered pages and a run back, and rewrites every other one of them.
    fn give_some_back(&mut self, count: usize) {
        let mut given = Vec::new();
        for _ in 0..count {
            let number = self.next_scattered();
            given.extend(self.give_back(number..number + 1));
        }
        let start = self.next_scattered();
        let end = (start + self.pages.len() / RUN_PART).min(self.pages.len());
        given.extend(self.give_back(start..end));
        self.check("after a discard");
        // Of its own in each VM: another one's page would show.
        let seed = mix(self.machine.doorbell().generation() ^ self.used as u64) | 1;
        for number in given.into_iter().step_by(2) {
            self.fill(number, seed);
        }
        self.check("after pages were rewritten");
    }

    fn next_scattered(&mut self) -> usize {
        let number = self.scatter.page(self.used);
        self.used += 1;
        number
    }

    fn give_back(&mut self, range: Range<usize>) -> Range<usize> {
        let taken = self.machine.discard(0, &self.pages[range.clone()]);
        if taken != range.len() {
            println!("wrong: discard: {taken} of the pages {range:?} were taken back");
            machine::exit(WRONG);
        }
        self.holds[range.clone()].fill(ZERO);
        range
    }

    /// Ends the machine unless every page holds what it must.
    fn check(&self, when: &str) {
        for (number, (page, &seed)) in self.pages.iter().zip(&self.holds).enumerate() {
            let checked = if seed == ZERO {
                page.check_zero()
            } else {
                page.check(seed, number as u64).map(|_sum| ())
            };
            if let Err(word) = checked {
                let doorbell = self.machine.doorbell();
                let kind = match seed {
                    ZERO => "given back",
                    FIRST => "never given back",
                    _ => "rewritten",
                };
                println!(
                    "wrong: discard: {when}: page {number} ({kind}) word {word}: {:#x} clone={} \
                     fork={}",
                    page.get(word),
                    doorbell.clone_id(),
                    doorbell.fork_count()
                );
                machine::exit(WRONG);
            }
        }
    }
}
