//! `work mib=64 every=1 read=0 write=0 order=linear|scattered rounds=0 dirty=0 tell=0`: a warm machine that waits, and a
//! job of known size for its clones: what the laboratory measures.
//!
//! Fills `mib` MiB with a pattern that tells each page, reports READY and halts. They are in one piece,
//! or, with `every=N`, one page in N of an area N times as large, the others of which it leaves alone. A clone reports
//! ACTION, reads and checks `read` pages, computes `rounds` rounds, writes the last `write` pages of
//! the area, reports ANSWER and halts. `linear` reads the first pages, `scattered` one in each chunk
//! of 64 KiB before any chunk has a second. A byte on the console has a VM that waits do the same
//! without a fork (`g`), write the first `dirty` pages and report READY once more (`d`), or fork itself
//! into one clone, which works like any other (`f`). With `tell=1`
//! USER + the pages that were read and USER + those that were written are reported before ANSWER.
//! Nothing is printed, and nothing else is touched meanwhile. Exit status 1: the console says what
//! differs. Only the first vCPU works.
//!
//! On a host without a doorbell reports are lines of the console: what a clone does can be had of a VM
//! that another VMM has saved and restored, by an `e` that waits when it is saved: as `g`, and the end.

use core::hint::black_box;

use forkvm_abi::SERIAL_GSI;
use forkvm_abi::doorbell::report;

use crate::args::Args;
use crate::jobs::{OK, USAGE, WRONG};
use crate::listener::Listener;
use crate::machine::Machine;
use crate::pages::{self, Page};
use crate::scatter::Scatter;
use crate::{interrupts, println, random, serial};

/// A word that the pattern leaves free.
const WRITTEN: usize = 1;

/// Fills, waits; in a clone, or when it is told, works.
pub fn run(machine: &Machine, args: Args<'_>) -> u32 {
    let listener = machine.listener();
    let count = args.number("mib", 64) as usize * pages::PER_MIB;
    let every = args.number("every", 1) as usize;
    let dirty = args.number("dirty", 0) as usize;
    let scatter = match args.text("order").unwrap_or("linear") {
        "linear" => None,
        "scattered" => Some(Scatter::new(count)),
        _ => {
            println!("order is one of linear, scattered");
            return USAGE;
        }
    };
    if every == 0 {
        println!("every: 1 or more");
        return USAGE;
    }
    let work = Work {
        read: args.number("read", 0) as usize,
        write: args.number("write", 0) as usize,
        rounds: args.number("rounds", 0),
        tell: args.flag("tell"),
        memory: Area::of(count, every),
        scatter,
    };
    if work.read.max(work.write).max(dirty) > count {
        println!("read, write and dirty: at most the {count} pages that there are");
        return USAGE;
    }
    (0..count).for_each(|number| work.memory.page(number).fill_lines(number as u64));
    listener.want_interrupt();
    interrupts::route(SERIAL_GSI);
    serial::interrupt_on_input();
    let mut seen = listener.fork_count();
    let mut told = 0u64;
    listener.report(report::READY);
    loop {
        // What is looked at below interrupts when it changes, and that changes the total.
        let total = interrupts::total();
        if listener.fork_count() != seen {
            seen = listener.fork_count();
            if listener.is_clone() && !work.done(&listener) {
                return WRONG;
            }
        }
        match serial::read() {
            None => interrupts::wait_for_any(total),
            Some(byte @ (b'g' | b'e')) => {
                if !work.done(&listener) {
                    return WRONG;
                }
                if byte == b'e' {
                    return OK;
                }
            }
            Some(b'd') => {
                told += 1;
                (0..dirty).for_each(|number| work.memory.page(number).set(WRITTEN, told));
                listener.report(report::READY);
            }
            Some(b'f') => match machine.doorbell().fork_without_interrupt(0, 1) {
                Ok(forked) => {
                    seen = listener.fork_count();
                    if forked.id != 0 && !work.done(&listener) {
                        return WRONG;
                    }
                }
                Err(error) => println!("wrong: work: fork failed with error {error}"),
            },
            Some(_) => {}
        }
    }
}

/// The pages that are filled, and the gaps between them.
struct Area {
    pages: &'static [Page],
    every: usize,
}

impl Area {
    /// `count` pages to fill, each the first of `every`.
    fn of(count: usize, every: usize) -> Area {
        Area {
            pages: pages::allocate_chunks(count * every),
            every,
        }
    }

    /// How many are to be filled.
    fn count(&self) -> usize {
        self.pages.len() / self.every
    }

    /// The one with this number.
    fn page(&self, number: usize) -> &Page {
        &self.pages[number * self.every]
    }
}

/// What a clone has to do.
struct Work {
    read: usize,
    write: usize,
    rounds: u64,
    tell: bool,
    memory: Area,
    scatter: Option<Scatter>,
}

impl Work {
    /// Does it; false, with the reason printed, when a page is not what it was.
    fn done(&self, listener: &Listener<'_>) -> bool {
        listener.report(report::ACTION);
        for index in 0..self.read {
            let number = match &self.scatter {
                None => index,
                Some(scatter) => scatter.page(index),
            };
            if let Err(word) = self.memory.page(number).check_lines(number as u64) {
                println!("wrong: work: page {number} word {word} changed");
                return false;
            }
        }
        let result = (0..self.rounds).fold(1, |sum, _| black_box(random::mix(sum)));
        let count = self.memory.count();
        (count - self.write..count)
            .for_each(|number| self.memory.page(number).set(WRITTEN, result));
        if self.tell {
            listener.report(report::USER + self.read as u32);
            listener.report(report::USER + self.write as u32);
        }
        listener.report(report::ANSWER);
        true
    }
}
