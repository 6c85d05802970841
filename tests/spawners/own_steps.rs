//! A worker dies in the middle of one of its own steps, of which the engine hears only when they are over.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use forkvm::engine::Phase;
use forkvm::{CloneSpec, CloneVm, FaultConfig, FreezeKind, MemoryMode};

use crate::common::{
    Guest, LONG, Obedient, Setup, fork_by, is_part, need_kvm, run_part, scaled, with_causes,
    workers,
};
use crate::crashes::{expect_killed_with_its_worker, machines, process_of};
use crate::spread::{kill, wait_until};
use crate::test_worker::{Deaths, WORKERS};

const PAGES: u64 = 16;

/// What a worker does for each clone.
const OF_A_SPAWN: [Phase; 5] = [
    Phase::Spawn,
    Phase::Memory,
    Phase::Restore,
    Phase::Identity,
    Phase::Run,
];

/// What a worker does for a fork of its clone; all else is the engine's.
const OF_A_FORK: [Phase; 6] = [
    Phase::Request,
    Phase::Pause,
    Phase::Save,
    Phase::Freeze,
    Phase::Resume,
    Phase::Publish,
];

/// The one of two clones, in workers of their own, whose worker dies, and the other one.
fn victim_and_other(clones: Vec<CloneVm>) -> (CloneVm, CloneVm) {
    assert_ne!(process_of(&clones[0]), process_of(&clones[1]));
    let has_ended = |clone: &CloneVm| clone.member().wait_for(Default::default()).is_some();
    wait_until("a worker dies", || clones.iter().any(has_ended));
    let (mut gone, mut left): (Vec<_>, Vec<_>) = clones.into_iter().partition(has_ended);
    assert_eq!((gone.len(), left.len()), (1, 1), "one of the two workers");
    (gone.remove(0), left.remove(0))
}

/// Clones of the parent, which has written its pages, know them, and end.
fn expect_all_well(vm: &Guest, clones: &[CloneVm]) {
    for clone in clones {
        let mut clone = Obedient::new(vm, clone.member());
        clone.expect(0, 100, PAGES);
        clone.exit();
    }
}

/// The next fork finds as many workers as ever.
fn expect_unharmed(vm: &Guest, parent: &mut Obedient<'_>, mode: MemoryMode) {
    parent.expect(0, 100, PAGES);
    wait_until("all clones are gone", || vm.family().running().len() == 1);
    let clones = vm.fork(fork_by(FreezeKind::Auto, mode, 4)).unwrap();
    let mut processes: Vec<u32> = clones.iter().map(process_of).collect();
    processes.sort_unstable();
    processes.dedup();
    assert_eq!(processes.len(), WORKERS);
    expect_all_well(vm, &clones);
}

/// What the process has open, sorted.
fn open_descriptors() -> Vec<String> {
    let open = fs::read_dir("/proc/self/fd").unwrap();
    let targets = open.filter_map(|entry| fs::read_link(entry.unwrap().path()).ok());
    let mut targets: Vec<String> = targets.map(|to| to.display().to_string()).collect();
    targets.sort_unstable();
    targets
}

/// As many descriptors are open as when it was called first. Only of userfaultfds there may be more: those of two workers
/// come with the first of their images that has to be filled.
#[derive(Default)]
struct Level(Option<usize>);

impl Level {
    fn expect(&mut self, when: &str) {
        let userfaults = (1 + WORKERS) * FaultConfig::default().shards;
        let start = Instant::now();
        loop {
            let open = open_descriptors();
            let is_userfault = |name: &&String| name.contains("userfaultfd");
            let of_faults = open.iter().filter(is_userfault).count();
            let others = open.len() - of_faults;
            let level = *self.0.get_or_insert(others);
            if others <= level && of_faults <= userfaults {
                return;
            }
            assert!(
                start.elapsed() < LONG,
                "{when}: {level} descriptors and {userfaults} userfaultfds are due, open are {open:?}"
            );
            thread::sleep(Duration::from_millis(2));
        }
    }
}

fn boot(deaths: &Deaths) -> Guest {
    // A log would hold all clones that ever were.
    let vm = Setup::new(format!("job=obey pages={PAGES}"))
        .spawner(deaths.workers())
        .unlogged()
        .boot();
    vm.wait_ready(LONG).unwrap();
    vm
}

#[test]
fn a_worker_that_dies_at_any_of_its_steps_of_a_spawn_costs_its_clones_and_nobody_else() {
    need_kvm!();
    // Whose descriptors are counted is alone.
    run_part("own_steps::die_in_spawns", "true");
}

#[test]
#[ignore = "a_worker_that_dies_at_any_of_its_steps_of_a_spawn_… runs it in a process of its own"]
fn die_in_spawns() {
    if is_part("own_steps::die_in_spawns") {
        die_at_steps_of_a_spawn(MemoryMode::Cow);
    }
}

#[test]
fn a_worker_that_dies_at_any_of_its_steps_of_a_lazy_spawn_costs_its_clones_and_nobody_else() {
    need_kvm!();
    run_part("own_steps::die_in_lazy_spawns", "true");
}

#[test]
#[ignore = "a_worker_that_dies_at_any_of_its_steps_of_a_lazy_spawn_… runs it in a process of its own"]
fn die_in_lazy_spawns() {
    if is_part("own_steps::die_in_lazy_spawns") {
        die_at_steps_of_a_spawn(MemoryMode::Lazy);
    }
}

fn die_at_steps_of_a_spawn(mode: MemoryMode) {
    let deaths = Deaths::new();
    let vm = boot(&deaths);
    let mut parent = Obedient::new(&vm, vm.member());
    parent.write(0, 100, PAGES);
    let mut level = Level::default();
    // Before a worker has prepared any clone of the fork, and after one has.
    for (phase, time) in OF_A_SPAWN.into_iter().flat_map(|at| [(at, 1), (at, 3)]) {
        let when = format!("{phase}, for time {time}");
        let before = vm.fork(CloneSpec::new(2)).unwrap();
        // Their own start is over when they answer.
        for clone in &before {
            Obedient::new(&vm, clone.member()).expect(0, 100, 1);
        }
        deaths.arm(phase, time);
        let forked = vm.fork(fork_by(FreezeKind::Auto, mode, 4));
        let (victim, other) = victim_and_other(before);
        assert!(!deaths.is_armed(), "{when}");
        expect_killed_with_its_worker(&victim);
        match forked {
            Ok(clones) => {
                assert_eq!(phase, Phase::Run);
                let of_victim = |clone: &CloneVm| process_of(clone) == process_of(&victim);
                let (gone, left): (Vec<_>, Vec<_>) = clones.into_iter().partition(of_victim);
                gone.iter().for_each(expect_killed_with_its_worker);
                expect_all_well(&vm, &left);
            }
            Err(error) => {
                let due = format!("worker {} has died", process_of(&victim));
                let error = with_causes(&error);
                assert!(error.contains(&due), "{when}: {error}");
            }
        }
        expect_all_well(&vm, &[other]);
        drop(victim);
        expect_unharmed(&vm, &mut parent, mode);
        level.expect(&when);
    }
    parent.exit();
}

#[test]
fn a_worker_that_dies_at_any_of_its_steps_of_a_fork_costs_its_clones_and_nobody_else() {
    need_kvm!();
    run_part("own_steps::die_in_forks", "true");
}

#[test]
#[ignore = "a_worker_that_dies_at_any_of_its_steps_of_a_fork_… runs it in a process of its own"]
fn die_in_forks() {
    if is_part("own_steps::die_in_forks") {
        die_at_steps_of_a_fork(MemoryMode::Cow);
    }
}

#[test]
fn a_worker_that_dies_at_any_of_its_steps_of_a_lazy_fork_costs_its_clones_and_nobody_else() {
    need_kvm!();
    run_part("own_steps::die_in_lazy_forks", "true");
}

#[test]
#[ignore = "a_worker_that_dies_at_any_of_its_steps_of_a_lazy_fork_… runs it in a process of its own"]
fn die_in_lazy_forks() {
    if is_part("own_steps::die_in_lazy_forks") {
        die_at_steps_of_a_fork(MemoryMode::Lazy);
    }
}

fn die_at_steps_of_a_fork(mode: MemoryMode) {
    let deaths = Deaths::new();
    let vm = boot(&deaths);
    let mut parent = Obedient::new(&vm, vm.member());
    parent.write(0, 100, PAGES);
    let mut level = Level::default();
    for phase in OF_A_FORK {
        let clones = vm.fork(CloneSpec::new(2)).unwrap();
        let (forker, process) = (clones[0].member().clone(), process_of(&clones[0]));
        Obedient::new(&vm, &forker).write(0, 200, PAGES / 2);
        deaths.arm(phase, 1);
        let forked = forker.fork(fork_by(FreezeKind::Delta, mode, 2));
        assert!(!deaths.is_armed(), "{phase}");
        let error = with_causes(&forked.err().expect("its fork has failed"));
        assert!(error.contains("has died"), "{phase}: {error}");
        let (victim, other) = victim_and_other(clones);
        assert_eq!(process_of(&victim), process, "{phase}");
        expect_killed_with_its_worker(&victim);
        expect_all_well(&vm, &[other]);
        drop((victim, forker));
        expect_unharmed(&vm, &mut parent, mode);
        level.expect(phase.as_str());
    }
    parent.exit();
}

#[test]
fn a_worker_that_is_killed_as_it_fills_its_pool_costs_its_clones_and_nobody_else() {
    need_kvm!();
    let vm = Setup::new(format!("job=obey pages={PAGES}"))
        .spawner(workers())
        .boot();
    vm.wait_ready(LONG).unwrap();
    let mut parent = Obedient::new(&vm, vm.member());
    parent.write(0, 100, PAGES);
    let point = vm.fork_point(CloneSpec::new(1)).unwrap();
    let clones = vm.fork(CloneSpec::new(2)).unwrap();
    let worker = process_of(&clones[0]);
    let had = machines(worker);
    let killer = thread::spawn(move || {
        wait_until("it builds shells", || machines(worker) >= had + 3);
        kill(worker);
    });
    let error = point.fill_pool(scaled(100, 40)).unwrap_err();
    killer.join().unwrap();
    let due = format!("worker {worker} has died");
    assert!(with_causes(&error).contains(&due), "{error:?}");
    let (victim, other) = victim_and_other(clones);
    expect_killed_with_its_worker(&victim);
    expect_all_well(&vm, &[other]);

    // The worker that came for it has none yet, the other one more than it was to have.
    assert!(point.fill_pool(4).unwrap() >= 4);
    expect_unharmed(&vm, &mut parent, MemoryMode::Cow);
    parent.exit();
}
