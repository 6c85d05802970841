//! The search for torn images.
//!
//! Every vCPU of the parent sweeps over its pages without pause and never stops; only the vCPU's own
//! registers know what each page must hold. The parent is forked in bursts: the third fork of a burst
//! first completes the image of the first one, while the parent still writes the pages that this
//! image wants, and clones ask for the same pages. Clones are forked again, warm and cold. Parent,
//! clones, siblings, grandchildren, and clones that come late of an old fork point, all verify every
//! page. A wrong one is a line on the console and the end of its VM.

use std::fs::OpenOptions;
use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Instant;

use forkvm::abi::doorbell::report;
use forkvm::engine::{Member, WorkingSetPolicy};
use forkvm::{End, FaultConfig, ForkPoint, FreezeKind, MemoryMode};

use crate::common::{Guest, LONG, Setup, expect_end, fork_by, full_scale, need_kvm, scaled};

/// Forks of a parent in a row, with no wait between them: as many as make a VM feed one image more
/// than it may.
const BURST: u32 = 3;

/// How often a long test repeats its cell.
const REPEATED: u32 = 100;

/// A way to search.
#[derive(Clone, Copy)]
struct Search {
    /// The parent's first fork, and all that follow.
    first: FreezeKind,
    then: FreezeKind,
    mode: MemoryMode,
    vcpus: u32,
    /// Pages of each vCPU.
    pages: u32,
    forks: u32,
    /// Whether images are filled in the background as well.
    copier: bool,
    /// Whether forks are given what the clones of earlier ones touched.
    working_set: WorkingSetPolicy,
}

/// The parent keeps its memory shared; its clones have private memory.
const WRITE_PROTECT: Search = Search {
    first: FreezeKind::WriteProtect,
    then: FreezeKind::WriteProtect,
    mode: MemoryMode::Lazy,
    vcpus: 1,
    pages: 1024,
    forks: 51,
    copier: false,
    working_set: WorkingSetPolicy::Off,
};

const DELTA: Search = Search {
    first: FreezeKind::Remap,
    then: FreezeKind::Delta,
    ..WRITE_PROTECT
};

/// Clones of whole images: what they are filled from is frozen all the same.
const REMAP: Search = Search {
    mode: MemoryMode::Cow,
    forks: 21,
    ..DELTA
};

/// Pages of each of four vCPUs.
const ON_4_VCPUS: u32 = 256;

/// Pages of all vCPUs together, so many that an image is not full yet when the copier comes to it.
const FOR_THE_COPIER: u32 = 8192;

impl Search {
    const fn on_4_vcpus(self) -> Search {
        Search {
            vcpus: 4,
            pages: ON_4_VCPUS,
            ..self
        }
    }

    const fn with_copier(self) -> Search {
        Search {
            pages: FOR_THE_COPIER / self.vcpus,
            forks: 6,
            copier: true,
            ..self
        }
    }

    const fn with_replays(self) -> Search {
        Search {
            forks: 21,
            working_set: WorkingSetPolicy::RecordAndReplay,
            ..self
        }
    }

    fn run(self) {
        need_kvm!();
        let start = Instant::now();
        let pages = scaled(self.pages, 64);
        let memory_mib = 64 + u64::from(pages * self.vcpus) / 256;
        let background = self.copier.then_some(100_000);
        let vm = Setup::new(format!("job=sweep pages={pages} still=64"))
            .vcpus(self.vcpus)
            .memory_mib(memory_mib)
            .faults(FaultConfig {
                background,
                working_set: self.working_set,
                ..FaultConfig::default()
            })
            .boot();
        vm.wait_ready(LONG).unwrap();
        let mut forks = 0;
        if self.first != self.then {
            let remapped = vm
                .fork_point(fork_by(self.first, MemoryMode::Cow, 1))
                .unwrap();
            self.verify_clone_of(&vm, &remapped);
            forks += 1;
        }
        let mut old = None;
        for round in 0.. {
            if forks >= self.forks.min(scaled(u32::MAX, 3 * BURST)) {
                break;
            }
            old = Some(self.burst(&vm, round, old));
            forks += BURST;
        }
        let figures = vm.family().faults().figures();
        println!("{forks} forks in {:?}: {figures:?}", start.elapsed());
        assert_eq!(vm.consoles.text(), "");
        if self.mode == MemoryMode::Cow {
            assert_eq!(figures.pages_by_fault, 0, "{figures:?}");
        } else if full_scale() && !self.copier {
            // A fast copier, or a parent with few pages, leaves nothing to the others.
            assert!(figures.pages_by_fault > 0, "{figures:?}");
            assert!(figures.pages_by_background > 0, "{figures:?}");
        }
        if full_scale() {
            let raced = figures.pages_by_parent_write + figures.pages_by_background;
            assert!(raced > 0, "{figures:?}");
        }
    }

    /// Forks three times, and a clone twice. Returns a fork point for the next round, which has a
    /// clone of `old`. Few VMs run at a time: they never rest, and would only wait for each other.
    fn burst(self, vm: &Guest, round: u32, old: Option<Arc<ForkPoint>>) -> Arc<ForkPoint> {
        let spec = fork_by(self.then, self.mode, 1);
        let before = checks(vm.member(), self.vcpus);
        let mut points: Vec<_> = (0..BURST)
            .map(|_| vm.fork_point(spec.clone()).unwrap())
            .collect();
        // Another one each time: the image that is complete by now, the one that still fills, or
        // the one that has just been made.
        let first = points.remove(round as usize % points.len());
        let clone = first.spawn(1).unwrap().remove(0);
        let again = fork_by(FreezeKind::Delta, self.mode, 1);
        let of_cold = clone.fork(again.clone()).unwrap().clones.remove(0);
        self.verify_and_end(vm, of_cold);
        expect_checked(vm, &clone, &self.never());
        let once = checks(&clone, self.vcpus);
        let of_warm = clone.fork(again).unwrap().clones.remove(0);
        self.verify_and_end(vm, of_warm);
        expect_checked(vm, &clone, &once);
        self.verify_and_end(vm, clone);

        expect_checked(vm, vm.member(), &before);
        for point in points.iter().chain(&old) {
            self.verify_clone_of(vm, point);
        }
        first
    }

    fn never(self) -> Vec<usize> {
        vec![0; self.vcpus as usize]
    }

    fn verify_clone_of(self, vm: &Guest, point: &Arc<ForkPoint>) {
        self.verify_and_end(vm, point.spawn(1).unwrap().remove(0));
    }

    fn verify_and_end(self, vm: &Guest, clone: Arc<Member>) {
        expect_checked(vm, &clone, &self.never());
        clone.kill();
        expect_end(vm, &clone, End::Killed);
    }

    fn repeat(self) {
        for round in 1..=REPEATED {
            println!("round {round} of {REPEATED}");
            self.run();
        }
    }
}

/// How often each vCPU of `member` has verified its pages.
fn checks(member: &Member, vcpus: u32) -> Vec<usize> {
    let reports = member.reports();
    let of = |vcpu| {
        let value = report::USER + vcpu;
        reports.iter().filter(|(said, _)| *said == value).count()
    };
    (0..vcpus).map(of).collect()
}

/// Each vCPU of `member` has verified its pages once more than `before`.
fn expect_checked(vm: &Guest, member: &Member, before: &[usize]) {
    for (vcpu, before) in (0..).zip(before) {
        if let Err(error) = member.wait_report(report::USER + vcpu, before + 1, LONG) {
            panic!("{error}\n{}", vm.consoles.text());
        }
    }
}

/// Has the kernel move memory about as long as it lives: a page that is being moved looks like one
/// that was swapped out.
struct Compaction {
    over: Arc<AtomicBool>,
    times: Arc<AtomicU32>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Compaction {
    /// `None`, said aloud, where this process may not ask for it.
    fn start() -> Option<Compaction> {
        let path = "/proc/sys/vm/compact_memory";
        let mut file = match OpenOptions::new().write(true).open(path) {
            Ok(file) => file,
            Err(error) => {
                println!("without compaction: {path}: {error}");
                return None;
            }
        };
        let (over, times) = (Arc::new(AtomicBool::new(false)), Arc::default());
        let (seen, counted): (_, Arc<AtomicU32>) = (over.clone(), Arc::clone(&times));
        let thread = thread::spawn(move || {
            while !seen.load(Ordering::Relaxed) {
                file.write_all(b"1").unwrap();
                counted.fetch_add(1, Ordering::Relaxed);
            }
        });
        Some(Compaction {
            over,
            times,
            thread: Some(thread),
        })
    }
}

impl Drop for Compaction {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(Err(panic)) = self.thread.take().map(thread::JoinHandle::join) {
            println!("the compaction ended early: {panic:?}");
        }
        println!("{} compactions", self.times.load(Ordering::Relaxed));
    }
}

/// One at a time: the compaction is that of the whole host.
fn under_compaction(search: Search) {
    let search = Search {
        forks: 21,
        ..search
    };
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock();
    let _compaction = Compaction::start();
    search.run();
}

macro_rules! searches {
    ($($name:ident $long:ident: $search:expr;)*) => {$(
        #[test]
        fn $name() {
            $search.run();
        }

        #[test]
        #[ignore = "long"]
        fn $long() {
            $search.repeat();
        }
    )*};
}

searches! {
    write_protect_1vcpu write_protect_1vcpu_long: WRITE_PROTECT;
    write_protect_4vcpu write_protect_4vcpu_long: WRITE_PROTECT.on_4_vcpus();
    write_protect_1vcpu_copier write_protect_1vcpu_copier_long: WRITE_PROTECT.with_copier();
    write_protect_4vcpu_copier write_protect_4vcpu_copier_long:
        WRITE_PROTECT.on_4_vcpus().with_copier();
    delta_1vcpu delta_1vcpu_long: DELTA;
    delta_4vcpu delta_4vcpu_long: DELTA.on_4_vcpus();
    delta_1vcpu_copier delta_1vcpu_copier_long: DELTA.with_copier();
    delta_4vcpu_copier delta_4vcpu_copier_long: DELTA.on_4_vcpus().with_copier();
    write_protect_1vcpu_replayed write_protect_1vcpu_replayed_long: WRITE_PROTECT.with_replays();
    delta_4vcpu_replayed delta_4vcpu_replayed_long: DELTA.on_4_vcpus().with_replays();
    remap_1vcpu remap_1vcpu_long: REMAP;
    remap_4vcpu remap_4vcpu_long: REMAP.on_4_vcpus();
}

#[test]
fn write_protect_4vcpu_under_compaction() {
    under_compaction(WRITE_PROTECT.on_4_vcpus());
}

#[test]
fn delta_4vcpu_under_compaction() {
    under_compaction(DELTA.on_4_vcpus());
}

/// A remap takes the memory away that the images before it still want.
#[test]
fn a_remap_after_write_protect_tears_no_earlier_image() {
    need_kvm!();
    let pages = scaled(2048, 64);
    for _ in 0..scaled(5, 1) {
        let vm = Setup::new(format!("job=sweep pages={pages}"))
            .no_copier()
            .boot();
        vm.wait_ready(LONG).unwrap();
        let write_protect = fork_by(FreezeKind::WriteProtect, MemoryMode::Lazy, 1);
        let mut points: Vec<_> = (0..2)
            .map(|_| vm.fork_point(write_protect.clone()).unwrap())
            .collect();
        let remap = fork_by(FreezeKind::Remap, MemoryMode::Cow, 1);
        points.push(vm.fork_point(remap).unwrap());
        let delta = fork_by(FreezeKind::Delta, MemoryMode::Lazy, 1);
        points.push(vm.fork_point(delta).unwrap());
        for point in &points {
            WRITE_PROTECT.verify_clone_of(&vm, point);
        }
        assert_eq!(vm.consoles.text(), "");
    }
}
