//! The search for torn images.
//!
//! Every vCPU of the parent sweeps over its pages without pause and never stops; only the vCPU's own
//! registers know what each page must hold. The parent is forked in bursts: the third fork of a burst
//! first completes the image of the first one, while the parent still writes the pages that this
//! image wants, and clones ask for the same pages. Siblings run side by side, clones are forked again, warm and cold. Parent,
//! clones, siblings, grandchildren, and clones that come late of an old fork point, all verify every
//! page. A wrong one is a line on the console and the end of its VM.
//!
//! A machine is remapped once in its life, so the search of Remap boots one for each of its forks.

use std::fs::OpenOptions;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::Instant;

use forkvm::abi::doorbell::report;
use forkvm::engine::{Member, WorkingSetPolicy};
use forkvm::{End, FaultConfig, ForkPoint, FreezeKind, MemoryMode};

use crate::common::{Guest, LONG, Setup, expect_end, fork_by, full_scale, need_kvm, scaled};

/// Forks of a parent in a row, with no wait between them: as many as make a VM feed one image more
/// than it may.
const BURST: u32 = 3;

/// How often a long test repeats its cell: every second time under compaction, and with a quarter of the pages, which
/// leaves as many forks.
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
    /// MiB a second at which images are filled in the background as well.
    copier: Option<u32>,
    /// Whether forks are given what the clones of earlier ones touched.
    working_set: WorkingSetPolicy,
    /// Whether the host moves its memory about meanwhile.
    compaction: bool,
}

/// The parent keeps its memory shared; its clones have private memory.
const WRITE_PROTECT: Search = Search {
    first: FreezeKind::WriteProtect,
    then: FreezeKind::WriteProtect,
    mode: MemoryMode::Lazy,
    vcpus: 1,
    pages: 1024,
    forks: 51,
    copier: None,
    working_set: WorkingSetPolicy::Off,
    compaction: false,
};

const DELTA: Search = Search {
    first: FreezeKind::Remap,
    then: FreezeKind::Delta,
    ..WRITE_PROTECT
};

/// Clones of whole images: what they are filled from is frozen all the same.
const DELTA_COW: Search = Search {
    mode: MemoryMode::Cow,
    forks: 21,
    ..DELTA
};

/// What a remap leaves is a whole image at once: there is nothing for a copier to do.
const REMAP: Search = Search {
    then: FreezeKind::Remap,
    mode: MemoryMode::Cow,
    pages: 256,
    forks: 50,
    ..DELTA
};

/// MiB a second, so few that the copier is at work on an image of some MiB while it is forked and cloned again.
const SLOW_COPIER: u32 = 40;

impl Search {
    const fn on_4_vcpus(self) -> Search {
        Search {
            vcpus: 4,
            pages: self.pages / 4,
            ..self
        }
    }

    const fn with_copier(self) -> Search {
        Search {
            copier: Some(SLOW_COPIER),
            ..self
        }
    }

    const fn under_compaction(self) -> Search {
        Search {
            compaction: true,
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
        let compaction = self.compaction.then(Compaction::start);
        if self.then == FreezeKind::Remap {
            (0..scaled(self.forks, 3)).for_each(|_| self.remap());
        } else {
            self.fork_in_bursts();
        }
        if let Some(Some(compaction)) = compaction {
            assert!(compaction.end() > 0, "the host was asked to compact");
        }
    }

    fn boot(self) -> Guest {
        let pages = scaled(self.pages, 64);
        let memory_mib = 64 + u64::from(pages * self.vcpus) / 256;
        let vm = Setup::new(format!("job=sweep pages={pages} still=64"))
            .vcpus(self.vcpus)
            .memory_mib(memory_mib)
            .faults(FaultConfig {
                background: self.copier,
                working_set: self.working_set,
                ..FaultConfig::default()
            })
            .boot();
        vm.wait_ready(LONG).unwrap();
        vm
    }

    /// A machine that is remapped; its clones, a clone of one of them, and itself.
    fn remap(self) {
        let vm = self.boot();
        let before = checks(vm.member(), self.vcpus);
        let point = vm.fork_point(fork_by(self.then, self.mode, 1)).unwrap();
        let clone = self.siblings_of(&vm, &point);
        let again = fork_by(FreezeKind::Delta, MemoryMode::Lazy, 1);
        let of_clone = clone.fork(again).unwrap().clones.remove(0);
        self.verify_and_end(&vm, of_clone);
        self.end(&vm, &clone);
        expect_checked(&vm, vm.member(), &before);
        assert_eq!(vm.consoles.text(), "");
    }

    fn fork_in_bursts(self) {
        let start = Instant::now();
        let vm = self.boot();
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
        } else if full_scale() {
            // A parent with few pages leaves nothing to the others.
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
        self.end(vm, &clone);

        expect_checked(vm, vm.member(), &before);
        for point in points.iter().chain(&old) {
            let last = self.siblings_of(vm, point);
            self.end(vm, &last);
        }
        first
    }

    /// Two clones of `point` that touch the same pages at the same time. One of them is left.
    fn siblings_of(self, vm: &Guest, point: &Arc<ForkPoint>) -> Arc<Member> {
        let mut siblings = point.spawn(2).unwrap();
        for sibling in &siblings {
            expect_checked(vm, sibling, &self.never());
        }
        self.end(vm, &siblings.remove(0));
        siblings.remove(0)
    }

    fn never(self) -> Vec<usize> {
        vec![0; self.vcpus as usize]
    }

    fn verify_clone_of(self, vm: &Guest, point: &Arc<ForkPoint>) {
        self.verify_and_end(vm, point.spawn(1).unwrap().remove(0));
    }

    fn verify_and_end(self, vm: &Guest, clone: Arc<Member>) {
        expect_checked(vm, &clone, &self.never());
        self.end(vm, &clone);
    }

    fn end(self, vm: &Guest, clone: &Member) {
        clone.kill();
        expect_end(vm, clone, End::Killed);
    }

    fn repeat(self) {
        for round in 1..=REPEATED {
            println!("round {round} of {REPEATED}");
            Search {
                pages: self.pages / 4,
                compaction: round % 2 == 0,
                ..self
            }
            .run();
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

impl Compaction {
    /// How often it was done.
    fn end(mut self) -> u32 {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
        let times = self.times.load(Ordering::Relaxed);
        println!("{times} compactions");
        times
    }
}

impl Drop for Compaction {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
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
    write_protect_4vcpu_replayed write_protect_4vcpu_replayed_long:
        WRITE_PROTECT.on_4_vcpus().with_replays();
    delta_1vcpu delta_1vcpu_long: DELTA;
    delta_4vcpu delta_4vcpu_long: DELTA.on_4_vcpus();
    delta_1vcpu_copier delta_1vcpu_copier_long: DELTA.with_copier();
    delta_4vcpu_copier delta_4vcpu_copier_long: DELTA.on_4_vcpus().with_copier();
    delta_1vcpu_replayed delta_1vcpu_replayed_long: DELTA.with_replays();
    delta_1vcpu_cow delta_1vcpu_cow_long: DELTA_COW;
    delta_4vcpu_cow delta_4vcpu_cow_long: DELTA_COW.on_4_vcpus();
    remap_1vcpu remap_1vcpu_long: REMAP;
    remap_4vcpu remap_4vcpu_long: REMAP.on_4_vcpus();
}

#[test]
fn write_protect_1vcpu_under_compaction() {
    WRITE_PROTECT.under_compaction().run();
}

#[test]
fn write_protect_4vcpu_copier_under_compaction() {
    let search = WRITE_PROTECT.on_4_vcpus().with_copier();
    search.under_compaction().run();
}

#[test]
fn delta_1vcpu_copier_under_compaction() {
    DELTA.with_copier().under_compaction().run();
}

#[test]
fn delta_4vcpu_under_compaction() {
    DELTA.on_4_vcpus().under_compaction().run();
}

#[test]
fn remap_4vcpu_under_compaction() {
    REMAP.on_4_vcpus().under_compaction().run();
}

/// A remap takes the memory away that the images before it still want.
fn remap_after_write_protect() {
    need_kvm!();
    let pages = scaled(2048, 64);
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

#[test]
fn a_remap_after_write_protect_tears_no_earlier_image() {
    (0..scaled(5, 1)).for_each(|_| remap_after_write_protect());
}

#[test]
#[ignore = "long"]
fn a_remap_after_write_protect_tears_no_earlier_image_long() {
    (0..REPEATED).for_each(|_| remap_after_write_protect());
}
