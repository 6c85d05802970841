//! `window mib=1 shown=512 seed=1`: changes its page tables after a fork, and tells whether they are as before.
//!
//! Fills `mib` MiB, shows the first `shown` pages in a window ([`Window`]), each at the place of its number,
//! reports READY and halts. After a fork a clone reports ACTION and checks every page, and what each place of the
//! window shows. Then it overwrites all pages, shows them in reverse order, checks that as well, reports
//! ANSWER and halts: a clone that is put back to its fork point finds the first state and does all of
//! it again. Exit status 1: the console says what differs. Only the first vCPU works.

use forkvm_abi::doorbell::report;

use crate::args::Args;
use crate::jobs::WRONG;
use crate::machine::Machine;
use crate::pages::{self, Page};
use crate::paging::Window;
use crate::{println, ring0};

/// Fills, waits for forks, checks and changes.
pub fn run(machine: &Machine, args: Args<'_>) -> u32 {
    let doorbell = machine.doorbell();
    let seed = args.number("seed", 1);
    let memory = pages::allocate(args.number("mib", 1) as usize * pages::PER_MIB);
    let window = Window::open();
    let shown = args.number("shown", Window::PAGES as u64) as usize;
    let shown = &memory[..shown.clamp(1, memory.len().min(Window::PAGES))];
    fill(memory, seed);
    show(&window, shown.iter());
    doorbell.want_interrupt();
    // A fork may come with the report.
    let mut seen = doorbell.fork_count();
    doorbell.report(report::READY);
    loop {
        doorbell.wait_for_fork(seen);
        seen = doorbell.fork_count();
        doorbell.report_action_of_clone();
        if doorbell.clone_id() == 0 {
            continue;
        }
        if !is_as_shown(&window, shown.len(), seed, |index| index) || !is_filled(memory, seed) {
            return WRONG;
        }
        fill(memory, !seed);
        show(&window, shown.iter().rev());
        let last = shown.len() - 1;
        if !is_as_shown(&window, shown.len(), !seed, |index| last - index) {
            return WRONG;
        }
        doorbell.report(report::ANSWER);
    }
}

fn fill(memory: &[Page], seed: u64) {
    (0..)
        .zip(memory)
        .for_each(|(number, page)| page.fill(seed, number));
}

fn is_filled(memory: &[Page], seed: u64) -> bool {
    let mut numbered = (0..).zip(memory);
    numbered.all(|(number, page)| match page.check(seed, number) {
        Ok(_sum) => true,
        Err(word) => {
            println!("wrong: window: page {number} word {word} changed");
            false
        }
    })
}

fn show(window: &Window, pages: impl Iterator<Item = &'static Page>) {
    pages
        .enumerate()
        .for_each(|(index, page)| window.show(index, page));
    ring0::flush_translations();
}

/// Whether each place shows the page `number(place)`, filled by `seed`.
fn is_as_shown(window: &Window, places: usize, seed: u64, number: impl Fn(usize) -> usize) -> bool {
    (0..places).all(|place| {
        let right = window.page(place).get(0) == pages::word(seed, number(place) as u64, 0);
        if !right {
            println!(
                "wrong: window: place {place} does not show page {}",
                number(place)
            );
        }
        right
    })
}
