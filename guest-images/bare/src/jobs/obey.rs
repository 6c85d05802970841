//! `obey pages=4096`: does with its memory what the console says, so that a host can hold it, and
//! the VMs that are forked of it, against a model.
//!
//! The area has `pages` pages, zero at boot. A command is a line of decimal numbers behind a letter:
//!
//! | command | what it does |
//! |---|---|
//! | `w PAGE VALUE COUNT` | writes VALUE + i to page PAGE + i: 64 bits, at the first, a middle and the last word |
//! | `r PAGE COUNT` | a line `= PAGE V` for each page, or `! PAGE a b c` when its three words differ |
//! | `d PAGE COUNT` | gives the pages back to the host; a line `! d ANSWER` unless all were taken |
//! | `f` | nothing |
//! | `q STATUS` | ends the machine, after its `ok` |
//! | `t` | ends the machine by a triple fault |
//!
//! What is no command is answered by `? LINE`. A command begins with a line `> N`, printed when it was
//! read and before anything is done, and ends with `ok N`: N counts the commands of this VM and of
//! those that it was forked of. READY is reported when the first command can come; a
//! clone, which has a console of its own, reports ACTION. Only the first vCPU works.

use forkvm_abi::SERIAL_GSI;
use forkvm_abi::doorbell::report;

use crate::args::Args;
use crate::doorbell::Doorbell;
use crate::machine::Machine;
use crate::pages::{self, Page, WORDS};
use crate::{interrupts, println, ring0, serial};

/// Words of a page that are used: the first, a middle one and the last.
const PLACES: [usize; 3] = [0, WORDS / 2, WORDS - 1];
/// Bytes of the longest command.
const LINE: usize = 128;

/// Obeys until `q`.
pub fn run(machine: &Machine, args: Args<'_>) -> u32 {
    let doorbell = machine.doorbell();
    let memory = pages::allocate(args.number("pages", 4096) as usize);
    doorbell.want_interrupt();
    interrupts::route(SERIAL_GSI);
    serial::interrupt_on_input();
    let mut seen = doorbell.fork_count();
    let mut line = Line::default();
    let mut count = 0u64;
    doorbell.report(report::READY);
    loop {
        // What is looked at below interrupts when it changes, and that changes the total.
        let total = interrupts::total();
        if doorbell.fork_count() != seen {
            seen = doorbell.fork_count();
            doorbell.report_action_of_clone();
        }
        match serial::read() {
            None => interrupts::wait_for_any(total),
            Some(b'\n' | b'\r') if line.len == 0 => {}
            Some(b'\n' | b'\r') => {
                count += 1;
                println!("> {count}");
                let end = obey(doorbell, memory, line.text());
                line.len = 0;
                println!("ok {count}");
                if let Some(status) = end {
                    return status;
                }
            }
            Some(byte) => line.push(byte),
        }
    }
}

/// Does what `text` says; answers the exit status of a `q`.
fn obey(doorbell: &Doorbell, memory: &[Page], text: &str) -> Option<u32> {
    let mut words = text.split_ascii_whitespace();
    let letter = words.next().unwrap_or_default();
    let mut numbers = [0u64; 3];
    let mut len = 0;
    for word in words {
        match (numbers.get_mut(len), word.parse()) {
            (Some(number), Ok(value)) => *number = value,
            _ => return unknown(text),
        }
        len += 1;
    }
    let range = |page: u64, count: u64| {
        let (start, end) = (page as usize, page.checked_add(count)? as usize);
        Some((page.., memory.get(start..end)?))
    };
    match (letter, &numbers[..len]) {
        ("w", &[page, value, count]) => {
            let Some((_, pages)) = range(page, count) else {
                return unknown(text);
            };
            for (index, page) in (0u64..).zip(pages) {
                let value = value.wrapping_add(index);
                PLACES.iter().for_each(|&place| page.set(place, value));
            }
        }
        ("r", &[page, count]) => {
            let Some((numbers, pages)) = range(page, count) else {
                return unknown(text);
            };
            for (number, page) in numbers.zip(pages) {
                let [first, middle, last] = PLACES.map(|place| page.get(place));
                if first == middle && middle == last {
                    println!("= {number} {first}");
                } else {
                    println!("! {number} {first} {middle} {last}");
                }
            }
        }
        ("d", &[page, count]) => {
            let Some((_, pages)) = range(page, count) else {
                return unknown(text);
            };
            match doorbell.discard(0, pages) {
                Ok(taken) if taken == pages.len() => {}
                Ok(taken) => println!("! d {taken}"),
                Err(error) => println!("! d {error}"),
            }
        }
        ("f", &[]) => {}
        ("q", &[status]) => return Some(status as u32),
        ("t", &[]) => ring0::triple_fault(),
        _ => return unknown(text),
    }
    None
}

fn unknown(text: &str) -> Option<u32> {
    println!("? {text}");
    None
}

/// A line as far as it was typed. Not on the heap: a command touches no memory but what it says.
struct Line {
    bytes: [u8; LINE],
    len: usize,
}

impl Default for Line {
    fn default() -> Line {
        Line {
            bytes: [0; LINE],
            len: 0,
        }
    }
}

impl Line {
    /// Bytes beyond the longest command are lost.
    fn push(&mut self, byte: u8) {
        if let Some(place) = self.bytes.get_mut(self.len) {
            *place = byte;
            self.len += 1;
        }
    }

    /// What was typed; nothing if it is not UTF-8.
    fn text(&self) -> &str {
        core::str::from_utf8(&self.bytes[..self.len]).unwrap_or_default()
    }
}
