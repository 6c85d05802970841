//! `ring`: every vCPU asks for a fork at once.
//!
//! The host serves the calls one after the other. A vCPU that is answered -EIO rings again; every
//! other answer is final. Each VM of the family prints what its vCPUs were answered, in their
//! order, as `ring clone=I answers=[…]`, and exits 0.

use alloc::vec::Vec;
use core::sync::atomic::{AtomicI64, Ordering};

use forkvm_abi::errno;

use crate::args::Args;
use crate::barrier::Barrier;
use crate::jobs::OK;
use crate::machine::Machine;
use crate::{println, smp};

/// Rings and prints.
pub fn run(machine: &Machine, _args: Args<'_>) -> u32 {
    let doorbell = machine.doorbell();
    let answers: Vec<AtomicI64> = (0..smp::count()).map(|_| AtomicI64::new(0)).collect();
    let barrier = Barrier::new(smp::count());
    smp::run_on_all(&|cpu| {
        barrier.wait();
        let answer = loop {
            match doorbell.fork(cpu, 1) {
                Ok(forked) => break i64::from(forked.id),
                Err(error) if error == -errno::EIO => {}
                Err(error) => break error,
            }
        };
        answers[cpu].store(answer, Ordering::Relaxed);
    });
    println!("ring clone={} answers={answers:?}", doorbell.clone_id());
    OK
}
