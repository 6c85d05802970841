//! Clones that are killed while they wait for a page: nobody else may see anything of that.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use forkvm::engine::source::{PageSink, PageSource, SourceError, Sources};
use forkvm::{End, FaultConfig, FreezeKind, MemoryMode, RewindWay};

use crate::common::{LONG, Obedient, Setup, expect_end, fork_by, need_kvm, scaled};

/// Makes every source a far one, whose answers wait for a gate.
#[derive(Clone, Default)]
struct Gates(Arc<Gate>);

#[derive(Default)]
struct Gate {
    closed: Mutex<bool>,
    changed: Condvar,
    /// Calls that have come to the gate.
    asked: AtomicU64,
    /// Whether each call takes a while.
    slow: AtomicBool,
}

impl Gate {
    fn set_closed(&self, closed: bool) {
        *self.closed.lock().unwrap() = closed;
        self.changed.notify_all();
    }

    fn pass(&self) {
        self.asked.fetch_add(1, Ordering::SeqCst);
        if self.slow.load(Ordering::Relaxed) {
            thread::sleep(Duration::from_millis(1));
        }
        let mut closed = self.closed.lock().unwrap();
        while *closed {
            closed = self.changed.wait(closed).unwrap();
        }
    }
}

impl Sources for Gates {
    fn of_image(&self, source: Arc<dyn PageSource>) -> Arc<dyn PageSource> {
        let gate = self.0.clone();
        Arc::new(Far { gate, source })
    }
}

struct Far {
    gate: Arc<Gate>,
    source: Arc<dyn PageSource>,
}

impl PageSource for Far {
    fn name(&self) -> String {
        self.source.name()
    }

    fn fetch(&self, ranges: &[Range<u64>], sink: &mut dyn PageSink) -> Result<(), SourceError> {
        self.gate.pass();
        self.source.fetch(ranges, sink)
    }
}

const VALUE: u64 = 1_000_000;

/// A source that may be silent as long as a test wants.
fn patient() -> FaultConfig {
    FaultConfig {
        background: None,
        page_deadline: LONG,
        ..FaultConfig::default()
    }
}

#[test]
fn a_clone_killed_as_it_waits_for_a_page_ends_and_leaves_its_siblings_every_page() {
    need_kvm!();
    let pages = u64::from(scaled(256, 64));
    let gates = Gates::default();
    let gate = gates.0.clone();
    let vm = Setup::new(format!("job=obey pages={pages}"))
        .faults(patient())
        .sources(gates)
        .boot();
    vm.wait_ready(LONG).unwrap();
    let mut parent = Obedient::new(&vm, vm.member());
    parent.write(0, VALUE, pages);
    let clones = vm
        .fork(fork_by(FreezeKind::WriteProtect, MemoryMode::Lazy, 3))
        .unwrap();
    // Each is at its prompt, with what it needs for that.
    for clone in &clones {
        Obedient::new(&vm, clone.member()).say("f");
    }

    gate.set_closed(true);
    let asked = gate.asked.load(Ordering::SeqCst);
    let [killed, siblings @ ..] = &clones[..] else {
        unreachable!("three clones");
    };
    Obedient::new(&vm, killed.member()).begin(&format!("r 0 {pages}"));
    let mut first_sibling = Obedient::new(&vm, siblings[0].member());
    let line = format!("r 0 {pages}");
    first_sibling.begin(&line);
    let start = Instant::now();
    while gate.asked.load(Ordering::SeqCst) == asked {
        assert!(start.elapsed() < LONG, "no clone asks for a page");
        thread::yield_now();
    }
    killed.kill();
    expect_end(&vm, killed.member(), End::Killed);

    gate.set_closed(false);
    let read = first_sibling.answer(&line);
    let due: Vec<_> = (0..pages)
        .map(|page| format!("= {page} {}", VALUE + page))
        .collect();
    assert!(read == due, "{read:?}");
    for sibling in siblings {
        Obedient::new(&vm, sibling.member()).expect(0, VALUE, pages);
    }
    parent.expect(0, VALUE, pages);
}

#[test]
fn a_clone_rewound_as_it_waits_for_a_page_begins_anew_and_gets_every_page() {
    need_kvm!();
    for way in [RewindWay::Auto, RewindWay::SlotReadd, RewindWay::FreshShell] {
        let pages = u64::from(scaled(256, 64));
        let gates = Gates::default();
        let gate = gates.0.clone();
        let vm = Setup::new(format!("job=obey pages={pages}"))
            .faults(patient())
            .sources(gates)
            .boot();
        vm.wait_ready(LONG).unwrap();
        Obedient::new(&vm, vm.member()).write(0, VALUE, pages);
        let fork = fork_by(FreezeKind::WriteProtect, MemoryMode::Lazy, 1);
        let clone = vm.fork(fork).unwrap().remove(0);
        // It is at its prompt, with what it needs for that.
        Obedient::new(&vm, clone.member()).say("f");

        gate.set_closed(true);
        let asked = gate.asked.load(Ordering::SeqCst);
        Obedient::new(&vm, clone.member()).begin(&format!("r 0 {pages}"));
        let start = Instant::now();
        while gate.asked.load(Ordering::SeqCst) == asked {
            assert!(start.elapsed() < LONG, "the clone asks for no page");
            thread::yield_now();
        }
        clone.rewind_by(way).unwrap();
        gate.set_closed(false);
        Obedient::new(&vm, clone.member()).expect(0, VALUE, pages);
    }
}

/// Without a stage: one clone after the other is killed at any moment while all of them read, and
/// the parent writes.
#[test]
fn clones_killed_at_any_moment_of_their_faults_leave_their_siblings_every_page() {
    need_kvm!();
    let pages = u64::from(scaled(256, 64));
    let gates = Gates::default();
    gates.0.slow.store(true, Ordering::Relaxed);
    let vm = Setup::new(format!("job=obey pages={pages}"))
        .faults(patient())
        .sources(gates)
        .boot();
    vm.wait_ready(LONG).unwrap();
    let mut parent = Obedient::new(&vm, vm.member());
    for round in 0..u64::from(scaled(6, 2)) {
        let value = VALUE * (round + 1);
        parent.write(0, value, pages);
        let point = vm
            .fork_point(fork_by(FreezeKind::WriteProtect, MemoryMode::Lazy, 4))
            .unwrap();
        let clones = point.spawn(4).unwrap();
        let mut readers: Vec<_> = clones
            .iter()
            .map(|clone| Obedient::new(&vm, clone))
            .collect();
        let line = format!("r 0 {pages}");
        for reader in &mut readers {
            reader.begin(&line);
        }
        parent.begin(&format!("w 0 0 {pages}"));
        for (index, clone) in (0..).zip(&clones[1..]) {
            thread::sleep(Duration::from_micros(300 * (round + index)));
            clone.kill();
            expect_end(&vm, clone, End::Killed);
        }
        let read = readers[0].answer(&line);
        let due: Vec<_> = (0..pages)
            .map(|page| format!("= {page} {}", value + page))
            .collect();
        assert!(read == due, "{read:?}");
        parent.answer("w");
        // Every page has come by now, from wherever.
        let late = point.spawn(1).unwrap().remove(0);
        Obedient::new(&vm, &late).expect(0, value, pages);
        clones[0].kill();
        late.kill();
    }
}
