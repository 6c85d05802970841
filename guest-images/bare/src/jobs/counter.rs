//! `counter n=1`: every vCPU counts in a page of its own while the first one forks.
//!
//! Afterwards, in the parent and in each clone, no counter may be behind what it was before the
//! fork, each must go on, and each vCPU must find in memory exactly what it has counted in a
//! register: a lost or repeated step shows. A clone exits 0; the parent with the joined status.

use core::hint::spin_loop;
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use alloc::vec::Vec;

use forkvm_abi::doorbell::report;
use spin::Mutex;

use crate::args::Args;
use crate::doorbell::Forked;
use crate::jobs::{OK, WRONG};
use crate::machine::Machine;
use crate::pages::{self, Page};
use crate::{println, smp};

/// Steps that each counter must make before the fork and again after it.
const STEPS: u64 = 10_000;

/// Counts, forks, verifies.
pub fn run(machine: &Machine, args: Args<'_>) -> u32 {
    let clones = args.number("n", 1) as u32;
    let counters = pages::allocate(smp::count());
    counters.iter().for_each(|counter| counter.set(0, 0));
    let stop = AtomicBool::new(false);
    let wrong = AtomicU32::new(0);
    let forked = Mutex::new(None);
    smp::run_on_all(&|cpu| {
        if cpu == 0 {
            *forked.lock() = fork_while_counting(machine, clones, counters, &wrong);
            stop.store(true, Ordering::Release);
            return;
        }
        let mut counted = 0;
        while !stop.load(Ordering::Acquire) {
            if !step(&counters[cpu], &mut counted) {
                println!(
                    "wrong: counter {cpu} is {}, not {counted}",
                    counters[cpu].get(0)
                );
                wrong.store(WRONG, Ordering::Relaxed);
                return;
            }
        }
    });
    match forked.into_inner() {
        Some(forked) if wrong.into_inner() == OK => {
            let (clone, granted) = (forked.id, forked.granted);
            println!(
                "counter ok clone={clone} of={granted} vcpus={}",
                counters.len()
            );
            if clone == 0 {
                machine.join(0, forked)
            } else {
                OK
            }
        }
        _ => WRONG,
    }
}

/// The first vCPU's part; `None` when something is wrong.
fn fork_while_counting(
    machine: &Machine,
    clones: u32,
    counters: &[Page],
    wrong: &AtomicU32,
) -> Option<Forked> {
    let mut counted = 0;
    let mut count_all_to = |floor: &dyn Fn(usize) -> u64| -> bool {
        for (cpu, counter) in counters.iter().enumerate().skip(1) {
            while counter.get(0) < floor(cpu) {
                if wrong.load(Ordering::Relaxed) != 0 {
                    return false;
                }
                spin_loop();
            }
        }
        (0..STEPS).all(|_| step(&counters[0], &mut counted))
    };
    if !count_all_to(&|_| STEPS) {
        return None;
    }
    machine.doorbell().report(report::READY);
    let before: Vec<u64> = counters.iter().map(|counter| counter.get(0)).collect();
    let forked = machine.fork(0, clones);
    for (cpu, &before) in before.iter().enumerate() {
        let after = counters[cpu].get(0);
        if after < before {
            println!("wrong: counter {cpu} went back from {before} to {after}");
            return None;
        }
    }
    count_all_to(&|cpu| before[cpu] + STEPS).then_some(forked)
}

/// One step, unless the counter in memory is not what was counted.
fn step(counter: &Page, counted: &mut u64) -> bool {
    if counter.get(0) != *counted {
        return false;
    }
    *counted += 1;
    counter.set(0, *counted);
    true
}
