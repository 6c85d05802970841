//! `registers n=1 seed=1 stay=0`: every register class of every vCPU over a fork from inside.
//!
//! All vCPUs fill their registers; the first forks by an `out` with everything loaded, while the
//! others hold theirs. Parent and clones compare afterwards and name the first register that
//! differs. A clone exits 0, the parent with the joined status; with `stay=1` a clone reports ANSWER
//! instead and halts.

use alloc::string::String;
use core::hint::spin_loop;
use core::sync::atomic::{AtomicUsize, Ordering};

use forkvm_abi::doorbell::report;
use spin::Mutex;

use crate::args::Args;
use crate::doorbell::Forked;
use crate::jobs::{OK, WRONG};
use crate::machine::{self, Machine};
use crate::registers::{Hold, Registers, release};
use crate::{interrupts, println, smp};

/// Fills, forks, compares.
pub fn run(machine: &Machine, args: Args<'_>) -> u32 {
    let (clones, seed) = (args.number("n", 1) as u32, args.number("seed", 1));
    let forked: Mutex<Option<Result<Forked, i64>>> = Mutex::new(None);
    let wrong: Mutex<Option<(usize, String)>> = Mutex::new(None);
    let ready = AtomicUsize::new(1);
    smp::run_on_all(&|cpu| {
        let mut registers = Registers::new(cpu, seed);
        registers.set_system();
        if cpu == 0 {
            while ready.load(Ordering::Acquire) < smp::count() {
                spin_loop();
            }
            let ring = |port, value| registers.hold(Hold::Out { port, value });
            *forked.lock() = Some(machine.doorbell().fork_ringing(cpu, clones, ring));
            release();
        } else {
            ready.fetch_add(1, Ordering::Release);
            registers.hold(Hold::UntilReleased);
        }
        if let Err(difference) = registers
            .check_held()
            .and_then(|()| registers.check_system())
        {
            *wrong.lock() = Some((cpu, difference));
        }
    });
    let forked = match forked.into_inner() {
        Some(Ok(forked)) => forked,
        other => {
            println!("fork failed: {other:?}");
            return machine::REFUSED;
        }
    };
    if let Some((cpu, difference)) = wrong.into_inner() {
        println!(
            "wrong: registers: clone {} vCPU {cpu}: {difference}",
            forked.id
        );
        return WRONG;
    }
    println!("registers ok clone={} vcpus={}", forked.id, smp::count());
    if forked.id == 0 {
        return machine.join(0, forked);
    }
    if args.flag("stay") {
        machine.doorbell().report(report::ANSWER);
        interrupts::halt();
    }
    OK
}
