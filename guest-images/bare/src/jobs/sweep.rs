//! `sweep pages=256 still=64 clone_exit=0`: the torn-image oracle. It never stops writing.
//!
//! Every vCPU sweeps over `pages` pages of its own, in order and without pause: sweep s writes s at
//! eight places of each page. Between two pages, and only there, it looks at the fork count. When
//! that has changed, in a parent as in a clone, its own registers say what each of its pages must
//! hold: those before its position this sweep's number, the others the last one's. It checks every
//! place of them, its counters against a copy that it keeps in memory, and `still` pages that were
//! filled at boot and never written again. Then it reports USER + vCPU and sweeps on.
//!
//! READY is reported once all vCPUs have finished their first sweep. A mismatch is one line and the
//! end of the machine with status 1. With `clone_exit=1` a clone ends with 0 when all its vCPUs have
//! checked.

use forkvm_abi::doorbell::report;

use crate::args::Args;
use crate::barrier::Barrier;
use crate::doorbell::Doorbell;
use crate::jobs::{OK, USAGE, WRONG};
use crate::machine::{self, Machine};
use crate::pages::{self, Page};
use crate::{println, smp};

/// Seed of the pages that stay.
const SEED: u64 = 3;
/// Words of a vCPU's copy of its counters.
const SWEEP: usize = 0;
const POSITION: usize = 1;
/// Bits of a stamp for the number of the sweep; above them are 20 for the page, then the vCPU.
const SWEEP_BITS: u32 = 39;
const PAGE_BITS: u32 = 20;

/// Sweeps until a mismatch, or, in a clone, until it has checked.
pub fn run(machine: &Machine, args: Args<'_>) -> u32 {
    let count = args.number("pages", 256) as usize;
    if count == 0 || count > 1 << PAGE_BITS {
        println!("sweep pages=N: 1 to {}", 1 << PAGE_BITS);
        return USAGE;
    }
    let (own, copies) = (
        pages::allocate(smp::count() * count),
        pages::allocate(smp::count()),
    );
    let still = pages::allocate(args.number("still", 64) as usize);
    still
        .iter()
        .zip(0..)
        .for_each(|(page, number)| page.fill(SEED, number));
    let barrier = Barrier::new(smp::count());
    smp::run_on_all(&|cpu| {
        Sweeper {
            doorbell: machine.doorbell(),
            barrier: &barrier,
            clone_exit: args.flag("clone_exit"),
            cpu,
            pages: &own[cpu * count..][..count],
            copy: &copies[cpu],
            still,
        }
        .sweep()
    });
    OK
}

/// A vCPU and what it needs; its counters are not here, but in its registers.
struct Sweeper<'a> {
    doorbell: &'a Doorbell,
    barrier: &'a Barrier,
    clone_exit: bool,
    cpu: usize,
    pages: &'a [Page],
    copy: &'a Page,
    still: &'a [Page],
}

/// A word that is not what it must be.
struct Mismatch {
    kind: &'static str,
    page: usize,
    place: usize,
    found: u64,
    expected: u64,
}

impl Sweeper<'_> {
    fn sweep(&self) {
        let mut seen = self.doorbell.fork_count();
        for (number, page) in self.pages.iter().enumerate() {
            page.stamp(self.stamp(number, 0));
        }
        for sweep in 1.. {
            for (position, page) in self.pages.iter().enumerate() {
                self.copy.set(SWEEP, sweep);
                self.copy.set(POSITION, position as u64);
                let forks = self.doorbell.fork_count();
                if forks != seen {
                    seen = forks;
                    self.judge(sweep, position);
                }
                page.stamp(self.stamp(position, sweep));
            }
            if sweep == 1 {
                self.barrier.wait();
                if self.cpu == 0 {
                    self.doorbell.report(report::READY);
                }
            }
        }
    }

    /// What `sweep` writes to page `number`: no other page ever holds it.
    fn stamp(&self, number: usize, sweep: u64) -> u64 {
        (self.cpu as u64) << (SWEEP_BITS + PAGE_BITS) | (number as u64) << SWEEP_BITS | sweep
    }

    /// After a fork, with the counters of the caller.
    fn judge(&self, sweep: u64, position: usize) {
        let clone_id = self.doorbell.clone_id();
        if self.cpu == 0 {
            self.doorbell.report_action_of_clone();
        }
        if let Err(mismatch) = self.check(sweep, position) {
            let Mismatch {
                kind,
                page,
                place,
                found,
                expected,
            } = mismatch;
            println!(
                "wrong: sweep: vcpu={} {kind} page={page} place={place} found={found:#x} \
                 expected={expected:#x} sweep={sweep} position={position} fork_count={} \
                 clone_id={clone_id}",
                self.cpu,
                self.doorbell.fork_count(),
            );
            machine::exit(WRONG);
        }
        self.doorbell.report(report::USER + self.cpu as u32);
        if self.clone_exit && clone_id != 0 {
            self.barrier.wait();
            machine::exit(OK);
        }
    }

    fn check(&self, sweep: u64, position: usize) -> Result<(), Mismatch> {
        let mismatch = |kind, page: &Page, number, place, expected| Mismatch {
            kind,
            page: number,
            place,
            found: page.get(place),
            expected,
        };
        for (place, expected) in [(SWEEP, sweep), (POSITION, position as u64)] {
            if self.copy.get(place) != expected {
                return Err(mismatch("copy", self.copy, self.cpu, place, expected));
            }
        }
        for (number, page) in self.pages.iter().enumerate() {
            let written = if number < position { sweep } else { sweep - 1 };
            let expected = self.stamp(number, written);
            page.check_stamp(expected)
                .map_err(|place| mismatch("own", page, number, place, expected))?;
        }
        for (number, page) in self.still.iter().enumerate() {
            page.check(SEED, number as u64).map_err(|place| {
                let expected = pages::word(SEED, number as u64, place);
                mismatch("still", page, number, place, expected)
            })?;
        }
        Ok(())
    }
}
