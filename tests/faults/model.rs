//! A whole family against a model of its memory: a random schedule of forks, writes, reads,
//! discards, ends and completions, and every page of every VM compared.
//!
//! `FORKVM_TEST_SEED=N` repeats the schedule of a seed; how the VMs' threads meet is not repeated.

use std::env;
use std::sync::Arc;
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

use forkvm::engine::{Member, WorkingSetPolicy};
use forkvm::{End, FaultConfig, ForkPoint, FreezeKind, MemoryMode};

use crate::common::switch::{Manner, Switch};
use crate::common::{Guest, LONG, Obedient, Setup, expect_end, fork_by, need_kvm, scaled};
use crate::family::PAGE;

use FreezeKind::{Auto, Copy, Delta, Remap, Stop, WriteProtect};
use MemoryMode::{Cow, Lazy};

/// VMs that run at a time.
const MOST_VMS: usize = 8;
/// Fork points that are kept for later.
const MOST_POINTS: usize = 2;

/// Numbers that follow from a seed.
struct Random(u64);

impl Random {
    /// Below `limit`.
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ mixed >> 31) % limit as u64) as usize
    }

    fn of<T: Clone>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())].clone()
    }
}

/// What was done, told when the test fails.
struct Schedule {
    seed: u64,
    steps: Vec<String>,
}

impl Drop for Schedule {
    fn drop(&mut self) {
        if thread::panicking() {
            let (seed, steps) = (self.seed, self.steps.join("\n"));
            println!("FORKVM_TEST_SEED={seed} does this again:\n{steps}");
        }
    }
}

/// A VM, and what it must hold.
struct Modelled<'a> {
    vm: Obedient<'a>,
    pages: Vec<u64>,
    /// Whether it maps its memory shared: it was booted, and never remapped.
    shared: bool,
}

/// A fork point, and what its clones must hold.
struct Kept {
    point: Arc<ForkPoint>,
    pages: Vec<u64>,
}

struct Run<'a> {
    guest: &'a Guest,
    random: Random,
    schedule: Schedule,
    vms: Vec<Modelled<'a>>,
    points: Vec<Kept>,
}

impl<'a> Run<'a> {
    fn note(&mut self, step: String) {
        self.schedule.steps.push(step);
    }

    fn name(&self, at: usize) -> &str {
        self.vms[at].vm.member.name()
    }

    /// Some pages: where they begin, and how many.
    fn some_pages(&mut self) -> (usize, usize) {
        let all = self.vms[0].pages.len();
        let start = self.random.below(all);
        (start, 1 + self.random.below((all - start).min(24)))
    }

    fn step(&mut self) {
        let at = self.random.below(self.vms.len());
        match self.random.below(20) {
            0..4 => self.fork(at),
            4..10 => self.write(at),
            10..14 => self.read(at),
            14..17 => self.give_back(at),
            17 => self.kill(at),
            18 => self.complete(at),
            _ => self.spawn_later(),
        }
    }

    /// A freeze that the VM at `at` can have.
    fn some_freeze(&mut self, at: usize) -> (FreezeKind, MemoryMode) {
        if self.vms[at].shared {
            let ways = [
                (Remap, Cow),
                (WriteProtect, Lazy),
                (WriteProtect, Lazy),
                (Copy, Cow),
            ];
            let more = [(Auto, Cow), (Auto, Lazy), (Stop, Cow), (Stop, Lazy)];
            let all: Vec<_> = ways.into_iter().chain(more).collect();
            self.random.of(&all)
        } else {
            let ways = [
                (Delta, Lazy),
                (Delta, Lazy),
                (Delta, Lazy),
                (Delta, Cow),
                (Copy, Cow),
            ];
            let more = [(Auto, Cow), (Auto, Lazy), (Stop, Cow), (Stop, Lazy)];
            let all: Vec<_> = ways.into_iter().chain(more).collect();
            self.random.of(&all)
        }
    }

    fn fork(&mut self, at: usize) {
        let (freeze, mode) = self.some_freeze(at);
        let count = 1 + self.random.below(2);
        let keep = self.points.len() < MOST_POINTS && self.random.below(3) == 0;
        let member = self.vms[at].vm.member.clone();
        self.note(format!(
            "fork {} into {count} by {freeze} {}{}",
            member.name(),
            mode.as_str(),
            if keep { ", and keep it" } else { "" }
        ));
        let ticket = match member.fork(fork_by(freeze, mode, count as u32)) {
            Ok(ticket) => ticket,
            Err(error) => panic!("{}", with_causes(&error)),
        };
        let pages = self.vms[at].pages.clone();
        if keep {
            let (point, pages) = (ticket.point.clone(), pages.clone());
            self.points.push(Kept { point, pages });
        }
        if ticket.point.freeze() == Remap {
            self.vms[at].shared = false;
        }
        if freeze == Stop {
            expect_end(self.guest, &member, End::Stopped);
            self.vms.remove(at);
        }
        self.enter(&ticket.clones, &pages);
    }

    fn enter(&mut self, clones: &[Arc<Member>], pages: &[u64]) {
        for clone in clones {
            self.vms.push(Modelled {
                vm: Obedient::new(self.guest, clone),
                pages: pages.to_vec(),
                shared: false,
            });
        }
        while self.vms.len() > MOST_VMS {
            let at = self.random.below(self.vms.len());
            self.kill(at);
        }
    }

    fn spawn_later(&mut self) {
        if self.points.is_empty() {
            return;
        }
        let kept = self.points.remove(self.random.below(self.points.len()));
        self.note("spawn a clone of a kept fork point".into());
        let clones = kept.point.spawn(1).unwrap();
        self.enter(&clones, &kept.pages);
    }

    fn write(&mut self, at: usize) {
        let (start, count) = self.some_pages();
        let value = self.random.below(1 << 40) as u64;
        self.note(format!(
            "{} writes {count} pages from {start}",
            self.name(at)
        ));
        let modelled = &mut self.vms[at];
        modelled.vm.write(start as u64, value, count as u64);
        for (page, value) in modelled.pages[start..start + count].iter_mut().zip(value..) {
            *page = value;
        }
    }

    fn read(&mut self, at: usize) {
        let (start, count) = self.some_pages();
        self.note(format!(
            "{} reads {count} pages from {start}",
            self.name(at)
        ));
        self.compare(at, start, count);
    }

    fn compare(&mut self, at: usize, start: usize, count: usize) {
        let modelled = &mut self.vms[at];
        let said = modelled.vm.say(&format!("r {start} {count}"));
        let pages = (start..).zip(&modelled.pages[start..start + count]);
        let due: Vec<String> = pages
            .map(|(page, value)| format!("= {page} {value}"))
            .collect();
        let wrong = due.iter().zip(&said).find(|(due, said)| due != said);
        let name = modelled.vm.member.name();
        assert!(wrong.is_none(), "{name} must say, and says, {wrong:?}");
        assert_eq!(said.len(), due.len(), "{name}");
    }

    fn give_back(&mut self, at: usize) {
        let (start, count) = self.some_pages();
        self.note(format!(
            "{} gives back {count} pages from {start}",
            self.name(at)
        ));
        let modelled = &mut self.vms[at];
        let said = modelled.vm.say(&format!("d {start} {count}"));
        assert_eq!(said, Vec::<String>::new(), "all pages are taken back");
        modelled.pages[start..start + count].fill(0);
    }

    /// Ends a VM, unless it is the last one.
    fn kill(&mut self, at: usize) {
        if self.vms.len() == 1 {
            return;
        }
        self.note(format!("kill {}", self.name(at)));
        let modelled = self.vms.remove(at);
        modelled.vm.member.kill();
        if self.random.below(2) == 0 {
            expect_end(self.guest, &modelled.vm.member, End::Killed);
        }
    }

    /// Has all come that the VM at `at` could miss.
    fn complete(&mut self, at: usize) {
        self.note(format!("complete what {} maps", self.name(at)));
        let copy = fork_by(Copy, Cow, 1);
        self.vms[at].vm.member.fork_point(copy).unwrap();
    }

    fn compare_all(&mut self) {
        for at in 0..self.vms.len() {
            self.compare(at, 0, self.vms[at].pages.len());
        }
    }
}

fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    let causes: Vec<_> = causes.map(ToString::to_string).collect();
    causes.join(": ")
}

fn follow(seed: u64, steps: u32) {
    println!("FORKVM_TEST_SEED={seed}");
    let mut random = Random(seed);
    let faults = FaultConfig {
        chunk: random.of(&[1, 4, 16]) * PAGE,
        readahead: random.of(&[0, 64 << 10, 1 << 20]),
        working_set: random.of(&[WorkingSetPolicy::Off, WorkingSetPolicy::RecordAndReplay]),
        shards: random.of(&[1, 2]),
        background: random.of(&[None, Some(1), Some(16), Some(4096)]),
        page_deadline: LONG,
    };
    let manner = random.of(&[Manner::Near, Manner::Near, Manner::Far]);
    let vcpus = random.of(&[1, 2]);
    let pages = scaled(160, 32);
    let switch = Switch::new();
    switch.set_all(manner);
    let guest = Setup::new(format!("job=obey pages={pages}"))
        .memory_mib(32)
        .vcpus(vcpus)
        .faults(faults)
        .sources(switch)
        .unlogged()
        .boot();
    guest.wait_ready(LONG).unwrap();
    let schedule = Schedule {
        seed,
        steps: vec![format!("{faults:?} {manner:?}, {vcpus} vCPUs")],
    };
    let origin = Modelled {
        vm: Obedient::new(&guest, guest.member()),
        pages: vec![0; pages as usize],
        shared: true,
    };
    let mut run = Run {
        guest: &guest,
        random,
        schedule,
        vms: vec![origin],
        points: Vec::new(),
    };
    for step in 1..=steps {
        run.step();
        if step % 50 == 0 {
            run.compare_all();
        }
    }
    while !run.points.is_empty() {
        run.spawn_later();
    }
    run.compare_all();
}

/// Of the environment, or a new one.
fn seed() -> u64 {
    let given = env::var("FORKVM_TEST_SEED").ok();
    let given = given.map(|text| text.parse().expect("FORKVM_TEST_SEED is a number"));
    given.unwrap_or_else(|| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        now.as_micros() as u64
    })
}

#[test]
fn every_vm_of_a_family_holds_what_it_must_after_any_schedule() {
    need_kvm!();
    let seed = seed();
    for schedule in 0..u64::from(scaled(3, 1)) {
        follow(seed + schedule, scaled(120, 25));
    }
}

#[test]
#[ignore = "long: hundreds of schedules"]
fn every_vm_of_a_family_holds_what_it_must_after_many_schedules() {
    need_kvm!();
    let seed = seed();
    for schedule in 0..u64::from(scaled(400, 20)) {
        follow(seed + schedule, scaled(200, 40));
    }
}
