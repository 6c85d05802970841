//! A worker dies: its clones end with it, by name, and nobody else does.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use forkvm::engine::Phase;
use forkvm::engine::spawn::Spawner;
use forkvm::{CloneSpec, CloneVm, End, FreezeKind, MemoryMode};

use crate::common::{
    Guest, LONG, Obedient, Setup, expect_end, expect_oracle_ok, finish_oracle, fork_by, need_kvm,
    scaled, workers,
};
use crate::spread::{kill, wait_until};

pub(crate) fn process_of(clone: &CloneVm) -> u32 {
    clone.member().process().expect("it lives in a worker")
}

pub(crate) fn expect_killed_with_its_worker(clone: &CloneVm) {
    let finished = clone.member().wait_for(LONG).expect("it has ended");
    let End::Failed(why) = finished.end else {
        panic!("{} {}", clone.member().name(), finished.end);
    };
    let process = process_of(clone).to_string();
    assert!(why.contains(&process) && why.contains("SIGKILL"), "{why}");
    assert!(finished.disks.is_empty() && finished.blk_counters.is_empty());
}

#[test]
fn the_clones_of_a_worker_that_is_killed_end_by_name_and_all_others_run_on() {
    need_kvm!();
    let vm = Setup::new("job=obey pages=64").spawner(workers()).boot();
    vm.wait_ready(LONG).unwrap();
    let mut parent = Obedient::new(&vm, vm.member());
    parent.write(0, 100, 64);
    let clones = vm.fork(CloneSpec::new(4)).unwrap();
    let victim = process_of(&clones[0]);
    kill(victim);
    let (gone, left): (Vec<_>, Vec<_>) = clones.iter().partition(|vm| process_of(vm) == victim);
    assert_eq!((gone.len(), left.len()), (2, 2));
    gone.iter()
        .for_each(|clone| expect_killed_with_its_worker(clone));
    for clone in left {
        let mut clone = Obedient::new(&vm, clone.member());
        clone.expect(0, 100, 64);
        clone.exit();
    }
    parent.expect(0, 100, 64);

    // The next fork has as many workers as before, and none that has died.
    let clones = vm.fork(CloneSpec::new(4)).unwrap();
    let processes: HashSet<u32> = clones.iter().map(process_of).collect();
    assert!(processes.len() == 2 && !processes.contains(&victim));
    for clone in &clones {
        let mut clone = Obedient::new(&vm, clone.member());
        clone.expect(0, 100, 64);
        clone.exit();
    }
    parent.exit();
}

#[test]
fn whoever_asks_something_of_a_clone_whose_worker_dies_hears_of_its_end() {
    need_kvm!();
    let vm = Setup::new("job=spin").spawner(workers()).boot();
    vm.wait_ready(LONG).unwrap();
    let clone = vm.fork(CloneSpec::new(1)).unwrap().remove(0);
    let asking = {
        let member = clone.member().clone();
        thread::spawn(move || {
            loop {
                if let Err(error) = member.console_input(b"x") {
                    return error;
                }
            }
        })
    };
    thread::sleep(Duration::from_millis(20));
    kill(process_of(&clone));
    let error = asking.join().unwrap();
    assert!(error.to_string().contains("has died"), "{error}");
    expect_killed_with_its_worker(&clone);
}

/// Forks an oracle while somebody kills a worker.
fn fork_while_a_worker_dies(vm: &Guest, forks: &mut u32, clones: u32) {
    match vm.fork(CloneSpec::new(clones)) {
        Ok(clones) => {
            *forks += 1;
            for clone in &clones {
                let end = clone.member().wait_for(LONG).expect("it ends").end;
                let known = match &end {
                    End::Exited(0) => true,
                    End::Failed(why) => why.contains("SIGKILL"),
                    _ => false,
                };
                assert!(known, "{end}\n{}", vm.consoles.text());
            }
        }
        Err(error) => {
            let error = format!("{error:?}");
            assert!(error.contains("Worker(Died"), "{error}");
        }
    }
}

/// The parent runs on, and can be forked again.
fn expect_unharmed(vm: &Guest, forks: &mut u32) {
    if *forks > 0 {
        // It tells the interrupts of two forks apart only when it has done with the first.
        expect_oracle_ok(vm, vm.member(), *forks);
    }
    let clones = vm.fork(CloneSpec::new(2)).unwrap();
    for clone in &clones {
        expect_end(vm, clone.member(), End::Exited(0));
    }
    *forks += 1;
    expect_oracle_ok(vm, vm.member(), *forks);
    assert_eq!(vm.family().running().len(), 1);
}

#[test]
fn a_worker_that_is_killed_at_any_step_of_a_spawn_fails_the_fork_or_its_clones_and_nothing_else() {
    need_kvm!();
    let process = workers();
    let victim: Arc<Mutex<Option<Phase>>> = Arc::default();
    let hook = {
        let (process, victim) = (process.clone(), victim.clone());
        move |phase, _: Option<&forkvm::vmm::PausedVm<'_>>| {
            let mut victim = victim.lock().unwrap();
            if *victim == Some(phase) {
                *victim = None;
                kill(process.processes()[0]);
            }
            Ok(())
        }
    };
    let vm = Setup::new("job=oracle mib=1")
        .spawner(process)
        .hook(hook)
        .boot();
    vm.wait_ready(LONG).unwrap();
    let mut forks = 0;
    for phase in Phase::ALL {
        *victim.lock().unwrap() = Some(phase);
        fork_while_a_worker_dies(&vm, &mut forks, 4);
        expect_unharmed(&vm, &mut forks);
        assert_eq!(
            *victim.lock().unwrap(),
            None,
            "a worker was killed at {phase}"
        );
    }
    finish_oracle(&vm, vm.member());
}

#[test]
fn a_worker_that_is_killed_at_any_moment_of_a_fork_harms_its_clones_alone() {
    need_kvm!();
    let process = workers();
    let vm = Setup::new("job=oracle mib=1")
        .spawner(process.clone())
        .boot();
    vm.wait_ready(LONG).unwrap();
    let mut forks = 0;
    for round in 0..scaled(25, 3) {
        process.check().unwrap();
        let worker = process.processes()[0];
        let killer = thread::spawn(move || {
            thread::sleep(Duration::from_micros(u64::from(round) * 400));
            kill(worker);
        });
        fork_while_a_worker_dies(&vm, &mut forks, 3);
        killer.join().unwrap();
        wait_until("its end is known", || {
            process.check().unwrap();
            !process.processes().contains(&worker)
        });
        expect_unharmed(&vm, &mut forks);
    }
    finish_oracle(&vm, vm.member());
}

#[test]
fn a_worker_that_is_killed_as_its_clone_is_forked_fails_that_fork_or_ends_its_clones_alone() {
    need_kvm!();
    let victim: Arc<Mutex<Option<(Phase, u32)>>> = Arc::default();
    let hook = {
        let victim = victim.clone();
        move |phase, _: Option<&forkvm::vmm::PausedVm<'_>>| {
            let mut victim = victim.lock().unwrap();
            if let Some((at, worker)) = *victim
                && at == phase
            {
                *victim = None;
                kill(worker);
            }
            Ok(())
        }
    };
    let vm = Setup::new("job=obey pages=64")
        .spawner(workers())
        .hook(hook)
        .boot();
    vm.wait_ready(LONG).unwrap();
    let mut origin = Obedient::new(&vm, vm.member());
    origin.write(0, 100, 64);
    for mode in [MemoryMode::Cow, MemoryMode::Lazy] {
        for phase in Phase::ALL {
            let clone = vm.fork(CloneSpec::new(1)).unwrap().remove(0);
            let worker = process_of(&clone);
            Obedient::new(&vm, clone.member()).write(0, 200, 32);
            *victim.lock().unwrap() = Some((phase, worker));
            let forked = clone.member().fork(fork_by(FreezeKind::Delta, mode, 2));
            assert_eq!(*victim.lock().unwrap(), None, "killed at {phase}");
            expect_killed_with_its_worker(&clone);
            // The worker did not live to say that its clone was forked: nobody has these clones.
            let error = forked.err().expect("the fork has failed").to_string();
            assert!(error.contains("has died"), "{phase}: {error}");
            wait_until("they are gone", || vm.family().running().len() == 1);
        }
    }
    origin.expect(0, 100, 64);
    let clone = vm.fork(CloneSpec::new(1)).unwrap().remove(0);
    Obedient::new(&vm, clone.member()).exit();
    origin.exit();
}

/// Machines of KVM that a process has.
pub(crate) fn machines(process: u32) -> usize {
    let fds = std::fs::read_dir(format!("/proc/{process}/fd")).unwrap();
    let targets = fds.filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok());
    targets
        .filter(|target| target.to_string_lossy().contains("kvm-vm"))
        .count()
}

#[test]
fn a_fork_of_which_one_clone_cannot_be_made_leaves_no_machine_in_any_worker() {
    need_kvm!();
    let process = workers();
    let left = Arc::new(Mutex::new(0));
    let hook = {
        let left = left.clone();
        move |phase, _: Option<&forkvm::vmm::PausedVm<'_>>| {
            let mut left = left.lock().unwrap();
            if phase == Phase::Identity {
                *left -= 1;
                if *left == 0 {
                    return Err(forkvm::engine::Vetoed("the test".into()));
                }
            }
            Ok(())
        }
    };
    let vm = Setup::new("job=oracle mib=1")
        .spawner(process.clone())
        // Shells that wait are machines, too.
        .pool(0)
        .hook(hook)
        .boot();
    vm.wait_ready(LONG).unwrap();
    for refused in [1, 3, 6] {
        *left.lock().unwrap() = refused;
        let error = vm.fork(CloneSpec::new(6)).err().expect("it is refused");
        assert!(format!("{error:?}").contains("the test"), "{error:?}");
        for worker in process.processes() {
            wait_until("no machine is left", || machines(worker) == 0);
        }
    }
    *left.lock().unwrap() = i32::MAX;
    for clone in vm.fork(CloneSpec::new(6)).unwrap() {
        expect_end(&vm, clone.member(), End::Exited(0));
    }
    finish_oracle(&vm, vm.member());
    for worker in process.processes() {
        wait_until("no machine is left", || machines(worker) == 0);
    }
}
