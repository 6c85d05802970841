//! A process dies while clones wait for pages: no page comes to be in an image that nobody put there.
//!
//! What waits may be a thread of the kernel's, on behalf of KVM, that no signal ends. If it went on when
//! the userfaultfd of a dying process closes, it would find a hole in the image's file and fill it.

use std::collections::HashSet;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use forkvm::engine::{ForkPoint, Member};
use forkvm::vmm::memory::data_extents;
use forkvm::{CloneSpec, End, FaultConfig, FreezeKind, MemoryMode};

use crate::common::switch::{Manner, Switch};
use crate::common::{Guest, LONG, Obedient, Setup, fork_by, need_kvm, workers_of};
use crate::engine_killed::Engine;
use crate::spread::{is_gone, kill, wait_until};

const PAGES: u64 = 256;

/// A parent, and cold clones of it in workers of their own; from now on sources stall.
struct Stalled {
    vm: Guest,
    switch: Switch,
    point: Arc<ForkPoint>,
    clones: Vec<Arc<Member>>,
}

impl Stalled {
    fn new(clones: u32) -> Stalled {
        let switch = Switch::new();
        let vm = Setup::new(format!("job=obey pages={PAGES}"))
            .spawner(workers_of(clones as usize, 1))
            .faults(FaultConfig {
                background: None,
                page_deadline: LONG,
                ..FaultConfig::default()
            })
            .sources(switch.clone())
            .boot();
        vm.wait_ready(LONG).unwrap();
        Obedient::new(&vm, vm.member()).write(0, 1000, PAGES);
        let cold = fork_by(FreezeKind::WriteProtect, MemoryMode::Lazy, clones);
        let point = vm.fork_point(cold).unwrap();
        let clones = point.spawn(clones).unwrap();
        for clone in &clones {
            Obedient::new(&vm, clone).expect(0, 1000, 1);
        }
        switch.set_all(Manner::Stall);
        Stalled {
            vm,
            switch,
            point,
            clones,
        }
    }

    /// Has `clone` touch what is not there.
    fn touch(&self, clone: &Member) {
        let all = format!("r 0 {PAGES}\n");
        assert_eq!(clone.console_input(all.as_bytes()).unwrap(), all.len());
    }
}

#[test]
fn a_worker_that_is_killed_as_its_clone_waits_for_a_page_leaves_none_to_the_others() {
    need_kvm!();
    for _ in 0..3 {
        let stalled = Stalled::new(2);
        let image = stalled.point.image().file();
        stalled.touch(&stalled.clones[0]);
        stalled.switch.wait_stalled();
        let before = data_extents(image).unwrap();
        let worker = stalled.clones[0].process().expect("it lives in a worker");
        kill(worker);
        let end = stalled.clones[0].wait_for(LONG).expect("it ends").end;
        assert!(
            matches!(&end, End::Failed(why) if why.contains("SIGKILL")),
            "{end}"
        );
        wait_until("the worker is gone", || is_gone(worker));
        assert_eq!(data_extents(image).unwrap(), before);

        stalled.switch.set_all(Manner::Far);
        let mut other = Obedient::new(&stalled.vm, &stalled.clones[1]);
        other.expect(0, 1000, PAGES);
        Obedient::new(&stalled.vm, stalled.vm.member()).expect(0, 1000, PAGES);
        other.exit();
    }
}

/// Clones of a clone, in workers of their own, whose pages come from its worker.
#[test]
fn a_worker_that_is_killed_costs_the_clones_of_its_clone_what_they_lack_and_nobody_else() {
    need_kvm!();
    let vm = Setup::new(format!("job=obey pages={PAGES}"))
        .spawner(workers_of(4, 1))
        .no_copier()
        .boot();
    vm.wait_ready(LONG).unwrap();
    let mut origin = Obedient::new(&vm, vm.member());
    origin.write(0, 1000, PAGES);
    let clone = vm.fork(CloneSpec::new(1)).unwrap().remove(0);
    let mut parent = Obedient::new(&vm, clone.member());
    parent.write(0, 2000, PAGES);
    let delta = fork_by(FreezeKind::Delta, MemoryMode::Lazy, 3);
    let ticket = parent.member.fork(delta).unwrap();
    let [mut warm, mut cold, mut late] =
        [0, 1, 2].map(|index| Obedient::new(&vm, &ticket.clones[index]));
    let processes: HashSet<_> = ticket.clones.iter().map(|vm| vm.process()).collect();
    assert!(processes.len() == 3 && !processes.contains(&clone.member().process()));
    for clone in [&mut warm, &mut cold, &mut late] {
        clone.expect(0, 2000, 1);
    }
    warm.expect(0, 2000, PAGES / 2);
    assert!(!ticket.point.image().is_whole());
    let image = ticket.point.image().file();
    let before = data_extents(image).unwrap();

    let worker = clone.member().process().expect("it lives in a worker");
    kill(worker);
    wait_until("the worker is gone", || is_gone(worker));
    let begun = cold.begin(&format!("r {} 1", PAGES - 1));
    let finished = cold.member.wait_for(Duration::from_secs(5));
    let end = finished.expect("it hangs on a page that never comes").end;
    let why = format!("worker {worker}");
    assert!(
        matches!(&end, End::Failed(text) if text.contains(&why)),
        "{end}"
    );
    println!("it ended after {:?}", begun.elapsed());
    // What others have brought is there for everybody.
    warm.expect(0, 2000, PAGES / 2);
    late.expect(0, 2000, PAGES / 2);
    warm.write(0, 1, PAGES / 2);
    assert_eq!(data_extents(image).unwrap(), before);
    warm.exit();
    late.exit();
    origin.expect(0, 1000, PAGES);
    origin.exit();
}

#[test]
fn workers_whose_engine_is_killed_as_their_clones_wait_for_pages_leave_none_in_its_images() {
    need_kvm!();
    let engine = Engine::start("mid_fault::wait_for_pages_and_to_be_killed", "stalled");
    let mut fds = engine.lines.iter();
    let fd = fds.find_map(|line| line.strip_prefix("image "));
    let fd = fd.expect("the engine stalled");
    let image = File::open(format!("/proc/{}/fd/{fd}", engine.id())).unwrap();
    let before = data_extents(&image).unwrap();
    assert!(!before.is_empty());
    assert_eq!(engine.workers.len(), 2);
    engine.kill();
    assert_eq!(data_extents(&image).unwrap(), before);
}

#[test]
#[ignore = "workers_whose_engine_is_killed_as_their_clones_wait_for_pages_leave_none_in_its_images runs it"]
fn wait_for_pages_and_to_be_killed() {
    if !Engine::is_this_process() {
        return;
    }
    let stalled = Stalled::new(2);
    // What the harness has begun to print has no end of line.
    println!();
    let spawner = &stalled.vm.family().config().spawner;
    for worker in spawner.processes() {
        println!("worker {worker}");
    }
    println!("image {}", stalled.point.image().file().as_raw_fd());
    for clone in &stalled.clones {
        stalled.touch(clone);
    }
    stalled.switch.wait_stalled();
    println!("stalled");
    thread::sleep(LONG);
}
