//! `work mib=64 read=0 write=0 order=linear|scattered rounds=0 dirty=0 tell=0`: a warm machine that waits, and a
//! job of known size for its clones: what the laboratory measures.
//!
//! Fills `mib` MiB with a pattern that tells each page, reports READY and halts. A clone reports
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
    let dirty = args.number("dirty", 0) as usize;
    let scatter = match args.text("order").unwrap_or("linear") {
        "linear" => None,
        "scattered" => Some(Scatter::new(count)),
        _ => {
            println!("order is one of linear, scattered");
            return USAGE;
        }
    };
    let work = Work {
        read: args.number("read", 0) as usize,
        write: args.number("write", 0) as usize,
        rounds: args.number("rounds", 0),
        tell: args.flag("tell"),
        memory: pages::allocate_chunks(count),
        scatter,
    };
    if work.read.max(work.write).max(dirty) > count {
        println!("read, write and dirty: at most the {count} pages that there are");
        return USAGE;
    }
    let numbered = || work.memory.iter().zip(0..);
    numbered().for_each(|(page, number)| page.fill_lines(number));
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
                let first = &work.memory[..dirty];
                first.iter().for_each(|page| page.set(WRITTEN, told));
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

/// What a clone has to do.
struct Work {
    read: usize,
    write: usize,
    rounds: u64,
    tell: bool,
    memory: &'static [Page],
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
            if let Err(word) = self.memory[number].check_lines(number as u64) {
                println!("wrong: work: page {number} word {word} changed");
                return false;
            }
        }
        let result = (0..self.rounds).fold(1, |sum, _| black_box(random::mix(sum)));
        let last = &self.memory[self.memory.len() - self.write..];
        last.iter().for_each(|page| page.set(WRITTEN, result));
        if self.tell {
            listener.report(report::USER + self.read as u32);
            listener.report(report::USER + self.write as u32);
        }
        listener.report(report::ANSWER);
        true
    }
}
