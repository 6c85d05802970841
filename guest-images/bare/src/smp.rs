//! The other vCPUs: their start, and work for all of them.
//!
//! vCPUs are numbered 0 (the first) to `count() - 1`. Between two pieces of work ([`run_on_all`])
//! all but the first halt. Code that needs to know where it runs is handed the number.

#![allow(unsafe_code)] // Hands a borrowed closure to other vCPUs.

use core::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

use forkvm_abi::MAX_VCPUS;

use crate::{boot, interrupts, ring0};

/// Rounds that a vCPU looks for the others to finish before it halts.
const SPIN: u32 = 2000;

/// vCPUs that have arrived in ring 3.
static STARTED: AtomicU32 = AtomicU32::new(1);
/// Number of the piece of work that was handed out last.
static ROUND: AtomicU32 = AtomicU32::new(0);
/// vCPUs that have finished it.
static FINISHED: AtomicU32 = AtomicU32::new(0);
/// The work: a pointer to a `&(dyn Fn(usize) + Sync)` on the stack of the first vCPU.
static WORK: AtomicPtr<&'static (dyn Fn(usize) + Sync)> = AtomicPtr::new(core::ptr::null_mut());
/// Local APIC of the first vCPU.
static FIRST: AtomicU32 = AtomicU32::new(0);

/// Starts all vCPUs of a machine that has `count` and waits until they are there.
pub fn start(count: u32) {
    FIRST.store(interrupts::lapic_id(), Ordering::Relaxed);
    if count.min(MAX_VCPUS) > 1 {
        boot::place_trampoline();
        interrupts::start_all_others(boot::TRAMPOLINE);
        while STARTED.load(Ordering::Acquire) < count.min(MAX_VCPUS) {
            core::hint::spin_loop();
        }
    }
}

/// Number of vCPUs that run.
pub fn count() -> usize {
    STARTED.load(Ordering::Acquire) as usize
}

/// Runs `work` once on every vCPU, each with its own number, and returns when all have finished.
/// Called on the first vCPU, outside of other work.
pub fn run_on_all(work: &(dyn Fn(usize) + Sync)) {
    // SAFETY: the lifetime is only hidden while the work runs: this function does not return, and
    // the guest does not unwind, before every vCPU has finished with the borrow.
    let work: &'static (dyn Fn(usize) + Sync) = unsafe { core::mem::transmute(work) };
    let others = count() as u32 - 1;
    if others > 0 {
        FINISHED.store(0, Ordering::Relaxed);
        WORK.store((&raw const work).cast_mut(), Ordering::Relaxed);
        ROUND.fetch_add(1, Ordering::Release);
        interrupts::wake_all_others();
    }
    work(0);
    let mut spun = 0;
    loop {
        let finished = FINISHED.load(Ordering::Acquire);
        if finished == others {
            return;
        }
        spun += 1;
        if spun < SPIN {
            core::hint::spin_loop();
        } else {
            ring0::wait_while(&FINISHED, finished);
        }
    }
}

/// Where the other vCPUs enter ring 3.
#[unsafe(no_mangle)]
extern "C" fn ap_start(number: u64) -> ! {
    interrupts::enable_local();
    let mut round = ROUND.load(Ordering::Acquire);
    STARTED.fetch_add(1, Ordering::Release);
    loop {
        while ROUND.load(Ordering::Acquire) == round {
            ring0::wait_while(&ROUND, round);
        }
        round = round.wrapping_add(1);
        // SAFETY: `run_on_all` stored the pointer before it raised ROUND, and keeps what it points
        // to until FINISHED says that this vCPU is done.
        let work = unsafe { *WORK.load(Ordering::Relaxed) };
        work(number as usize);
        FINISHED.fetch_add(1, Ordering::Release);
        interrupts::wake(FIRST.load(Ordering::Relaxed));
    }
}
