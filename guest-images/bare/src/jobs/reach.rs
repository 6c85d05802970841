//! `reach mib=64 touch=256 order=linear|scattered write=0 hot=0 exit=0`: what it takes a clone to
//! reach its memory.
//!
//! Fills `mib` MiB with a pattern that tells each page, reports READY and polls the fork count; with
//! `hot=1` it keeps rewriting one other page with a counter meanwhile. A clone reports ACTION, reads
//! and checks `touch` pages (with `write=1` it then writes to each), reports ANSWER, and touches
//! next to nothing else in between. `linear` takes the first pages, `scattered` one in each chunk of
//! 64 KiB before any chunk has a second. After ANSWER the counter on the hot page must be the one in
//! the registers. With `exit=1` the clone ends with status 0; otherwise it halts, and each clone
//! that is forked from it does the same again. Exit status 1: the console says what differs. Only
//! the first vCPU works.

use forkvm_abi::doorbell::report;

use crate::args::Args;
use crate::jobs::{OK, USAGE, WRONG};
use crate::machine::Machine;
use crate::pages::{self, Page};
use crate::println;
use crate::scatter::Scatter;

/// A word that the pattern leaves free.
const WRITTEN: usize = 1;

/// Fills, waits for forks; in a clone, reaches for the memory.
pub fn run(machine: &Machine, args: Args<'_>) -> u32 {
    let doorbell = machine.doorbell();
    let count = args.number("mib", 64) as usize * pages::PER_MIB;
    let touch = args.number("touch", 256) as usize;
    let scatter = match args.text("order").unwrap_or("linear") {
        "linear" => None,
        "scattered" => Some(Scatter::new(count)),
        _ => {
            println!("order is one of linear, scattered");
            return USAGE;
        }
    };
    if touch > count {
        println!("reach touch=K: at most the {count} pages that there are");
        return USAGE;
    }
    let (write, hot, exit) = (args.flag("write"), args.flag("hot"), args.flag("exit"));
    let memory = pages::allocate_chunks(count);
    memory
        .iter()
        .zip(0..)
        .for_each(|(page, number)| page.fill_lines(number));
    let hot_page = &pages::allocate(1)[0];
    hot_page.stamp(0);
    let number = |index| match &scatter {
        None => index,
        Some(scatter) => scatter.page(index),
    };

    let mut seen = doorbell.fork_count();
    let mut counter = 0;
    let mut halts = false;
    doorbell.report(report::READY);
    loop {
        if halts {
            doorbell.wait_for_fork(seen);
        }
        while doorbell.fork_count() == seen {
            if hot {
                counter += 1;
                hot_page.stamp(counter);
            }
        }
        seen = doorbell.fork_count();
        let clone = doorbell.clone_id();
        if clone != 0 {
            doorbell.report(report::ACTION);
            for number in (0..touch).map(number) {
                let page = &memory[number];
                if let Err(word) = page.check_lines(number as u64) {
                    return wrong(clone, seen, "page", number, page, word);
                }
                if write {
                    page.set(WRITTEN, u64::from(clone));
                }
            }
            doorbell.report(report::ANSWER);
        }
        if let Err(word) = hot_page.check_stamp(counter) {
            println!("wrong: reach: the counter is {counter}");
            return wrong(clone, seen, "hot page", 0, hot_page, word);
        }
        if clone != 0 && exit {
            return OK;
        }
        if clone != 0 {
            doorbell.want_interrupt();
            halts = true;
        }
    }
}

fn wrong(clone: u32, fork: u32, kind: &str, number: usize, page: &Page, word: usize) -> u32 {
    let found = page.get(word);
    println!("wrong: reach: {kind} {number} word {word}: {found:#x} clone={clone} fork={fork}");
    WRONG
}
