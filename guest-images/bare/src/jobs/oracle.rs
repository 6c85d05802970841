//! `oracle mib=8 writers=0 disk=0 irq=0 go-on=0`: the guest of the fork matrix. The host forks it,
//! at any moment; it knows what everything must be and says whether it is.
//!
//! All vCPUs keep pages with tagged content, a counter each, and registers with known values. With
//! `writers=1` they rewrite their pages without pause; with `disk=1` one of them writes to disk 0
//! without pause; with neither they halt. READY is reported when all of that is under way. When the
//! fork count changes, all vCPUs stop at their next step and verify everything. With `irq=1` the
//! interrupt that the host raised on [`TEST_GSI`] between pause and save must have arrived in this
//! VM, once per fork. A clone then exits 0, or with `go-on=1` works on as the parent does: what
//! works on reports USER + fork count modulo DISTINCT, and ends when `q` arrives on the console. Exit status 1:
//! the console says what differs.

use alloc::format;
use alloc::string::String;
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use forkvm_abi::doorbell::report;
use forkvm_abi::{SERIAL_GSI, TEST_GSI, slot};
use spin::Mutex;

use crate::args::Args;
use crate::barrier::Barrier;
use crate::doorbell::Doorbell;
use crate::jobs::{OK, USAGE, WRONG};
use crate::machine::{self, Machine};
use crate::pages::{self, Page};
use crate::random::mix;
use crate::registers::{Hold, Registers};
use crate::versioned_disk::VersionedDisk;
use crate::versioned_pages::VersionedPages;
use crate::virtio_blk::{Disk, Wait};
use crate::{interrupts, println, serial, smp, tsc};

/// Rounds that the registers are held in each step.
const ROUNDS: u32 = 200;
/// Steps between two looks at the console, each of which is an exit to the host.
const CONSOLE_STEPS: u64 = 64;
/// Bytes of disk 0 that are kept.
const DISK_BYTES: u64 = 1 << 20;
/// TSC cycles, some seconds, within which an interrupt has to arrive.
const PATIENCE: u64 = 20 << 30;

/// Sets everything going and verifies it at every fork.
pub fn run(machine: &Machine, args: Args<'_>) -> u32 {
    let doorbell = machine.doorbell();
    let disk = if args.flag("disk") {
        Disk::open(0)
    } else {
        None
    };
    if args.flag("disk") && disk.as_ref().is_none_or(Disk::read_only) {
        println!("oracle disk=1 needs a writable disk 0");
        return USAGE;
    }
    let oracle = Oracle {
        doorbell,
        pages: VersionedPages::new(args.number("mib", 8) as usize * pages::PER_MIB, 1),
        counters: pages::allocate(smp::count()),
        disk: disk.as_ref(),
        writers: args.flag("writers"),
        irq: args.flag("irq"),
        go_on: args.flag("go-on"),
        barrier: Barrier::new(smp::count()),
        seen: AtomicU32::new(doorbell.fork_count()),
        rings: AtomicU32::new(0),
        stop: AtomicBool::new(false),
        wrong: Mutex::new(None),
    };
    doorbell.want_interrupt();
    interrupts::route(TEST_GSI);
    interrupts::route(SERIAL_GSI);
    serial::interrupt_on_input();
    smp::run_on_all(&|cpu| oracle.work(cpu));
    println!("oracle done forks={}", doorbell.fork_count());
    OK
}

/// What all vCPUs share.
struct Oracle<'a> {
    doorbell: &'a Doorbell,
    pages: VersionedPages,
    counters: &'static [Page],
    disk: Option<&'a Disk>,
    writers: bool,
    irq: bool,
    go_on: bool,
    barrier: Barrier,
    /// Fork count up to which everything has been verified.
    seen: AtomicU32,
    /// Doorbell interrupts up to then.
    rings: AtomicU32,
    stop: AtomicBool,
    wrong: Mutex<Option<String>>,
}

/// What a vCPU has of its own.
struct Worker<'a> {
    cpu: usize,
    registers: Registers,
    counted: u64,
    next_page: usize,
    disk: Option<VersionedDisk<'a>>,
}

impl<'a> Oracle<'a> {
    /// A vCPU's life.
    fn work(&self, cpu: usize) {
        let mut worker = Worker {
            cpu,
            registers: Registers::new(cpu, 1),
            counted: 0,
            next_page: cpu,
            disk: self.start_disk(cpu),
        };
        worker.registers.set_system();
        worker.registers.hold(Hold::Rounds(ROUNDS));
        self.counters[cpu].set(0, 0);
        (cpu..self.pages.len())
            .step_by(smp::count())
            .for_each(|page| self.pages.write(page));
        self.barrier.wait();
        if cpu == 0 {
            self.doorbell.report(report::READY);
        }
        loop {
            if self.doorbell.fork_count() != self.seen.load(Ordering::Acquire) {
                self.judge(&mut worker);
            } else if self.stop.load(Ordering::Acquire) {
                return;
            } else {
                if let Err(difference) = self.step(&mut worker) {
                    self.fail(cpu, difference);
                }
                self.look_at_console(&worker);
            }
        }
    }

    /// Disk 0 belongs to the last vCPU.
    fn start_disk(&self, cpu: usize) -> Option<VersionedDisk<'a>> {
        let disk = self.disk.filter(|_| cpu == smp::count() - 1)?;
        match VersionedDisk::fill(disk, DISK_BYTES, 1) {
            Ok(sectors) => Some(sectors),
            Err(error) => self.fail(cpu, format!("disk: {error}")),
        }
    }

    fn step(&self, worker: &mut Worker<'_>) -> Result<(), String> {
        let counter = &self.counters[worker.cpu];
        if counter.get(0) != worker.counted {
            return Err(format!(
                "counter {}, not {}",
                counter.get(0),
                worker.counted
            ));
        }
        worker.counted += 1;
        counter.set(0, worker.counted);
        worker.registers.hold(Hold::Rounds(ROUNDS));
        worker.registers.check_held()?;
        if self.writers && worker.next_page < self.pages.len() {
            self.pages.check(worker.next_page)?;
            self.pages.write(worker.next_page);
        }
        worker.next_page += smp::count();
        if worker.next_page >= self.pages.len() {
            worker.next_page = worker.cpu;
        }
        if let Some(disk) = &mut worker.disk {
            disk.write_somewhere(Wait::Poll, || {})
                .map_err(|error| format!("disk: {error}"))?;
        }
        if !self.writers && self.disk.is_none() {
            let total = interrupts::total();
            // What ends the idleness is looked at after the total: an interrupt that tells of it
            // changes the total, so this does not sleep through it.
            if self.doorbell.fork_count() == self.seen.load(Ordering::Acquire)
                && !self.stop.load(Ordering::Acquire)
                && !(worker.cpu == 0 && serial::has_input())
            {
                interrupts::wait_for_any(total);
            }
        }
        Ok(())
    }

    /// `q` on the console ends the guest.
    fn look_at_console(&self, worker: &Worker<'_>) {
        let idle = !self.writers && self.disk.is_none();
        let due = idle || worker.counted.is_multiple_of(CONSOLE_STEPS);
        if worker.cpu == 0 && due && serial::read() == Some(b'q') {
            self.stop.store(true, Ordering::Release);
            interrupts::wake_all_others();
        }
    }

    /// All vCPUs come here after a fork.
    fn judge(&self, worker: &mut Worker<'_>) {
        if worker.cpu == 0 {
            self.doorbell.report_action_of_clone();
            interrupts::wake_all_others();
        }
        self.barrier.wait();
        if let Err(difference) = self.verify(worker) {
            *self.wrong.lock() = Some(format!("vCPU {}: {difference}", worker.cpu));
        }
        self.barrier.wait();
        let (fork, clone) = (self.doorbell.fork_count(), self.doorbell.clone_id());
        let salt = mix(u64::from(fork) << 32 ^ self.doorbell.generation());
        if worker.cpu == 0 {
            if let Err(difference) = self.verify_interrupts(fork) {
                self.fail(0, difference);
            }
            if let Some(difference) = self.wrong.lock().take() {
                self.fail(0, difference);
            }
            println!(
                "oracle ok fork={fork} clone={clone} pages={}",
                self.pages.len()
            );
            if clone != 0 && !self.go_on {
                machine::exit(OK);
            }
            self.pages.set_salt(salt);
            self.seen.store(fork, Ordering::Release);
            self.doorbell.report(report::USER + fork % report::DISTINCT);
        }
        if let Some(disk) = &mut worker.disk {
            disk.set_salt(salt);
        }
        self.barrier.wait();
    }

    /// A vCPU's part of everything.
    fn verify(&self, worker: &mut Worker<'_>) -> Result<(), String> {
        let counter = self.counters[worker.cpu].get(0);
        if counter != worker.counted {
            return Err(format!("counter {counter}, not {}", worker.counted));
        }
        worker.registers.check_held()?;
        worker.registers.check_system()?;
        for page in (worker.cpu..self.pages.len()).step_by(smp::count()) {
            self.pages.check(page)?;
        }
        match worker.disk.as_ref().map(VersionedDisk::check) {
            None | Some(Ok(None)) => Ok(()),
            Some(Ok(Some(sector))) => Err(format!("disk: sector {sector} is not what was written")),
            Some(Err(error)) => Err(format!("disk: {error}")),
        }
    }

    /// The doorbell's interrupt has come since the last fork, and the host's once per fork.
    fn verify_interrupts(&self, fork: u32) -> Result<(), String> {
        let rings = self.rings.load(Ordering::Relaxed);
        wait_until(|| interrupts::count(slot::DOORBELL_GSI) > rings);
        let now = interrupts::count(slot::DOORBELL_GSI);
        if now == rings {
            return Err("the doorbell's interrupt has not arrived".into());
        }
        self.rings.store(now, Ordering::Relaxed);
        if self.irq {
            wait_until(|| interrupts::count(TEST_GSI) >= fork);
            let count = interrupts::count(TEST_GSI);
            if count != fork {
                return Err(format!("{count} interrupts of the host's in {fork} forks"));
            }
        }
        Ok(())
    }

    fn fail(&self, cpu: usize, difference: String) -> ! {
        let (fork, clone) = (self.doorbell.fork_count(), self.doorbell.clone_id());
        println!("wrong: oracle: fork={fork} clone={clone} vCPU {cpu}: {difference}");
        machine::exit(WRONG)
    }
}

/// Returns when `condition` holds, or when [`PATIENCE`] is over.
fn wait_until(condition: impl Fn() -> bool) {
    let start = tsc::cycles();
    while !condition() && tsc::cycles().wrapping_sub(start) < PATIENCE {
        core::hint::spin_loop();
    }
}
