//! Forks of the same parent, forks of forks, and clones that come later or stay longer.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use forkvm::abi::doorbell::report;
use forkvm::engine::freeze::FreezeError;
use forkvm::engine::{Consoles, ForkError, Member, MemberError, Phase};
use forkvm::{CloneSpec, End, Error, FreezeKind, Identity};

use crate::common::{
    LONG, Setup, expect_end, expect_oracle_ok, finish_oracle, need_kvm, scaled, with_causes,
};

/// A guest that rewrites its memory all the time.
fn hot_oracle(vcpus: u32, more: &str) -> Setup {
    let mib = scaled(4, 1);
    Setup::new(format!("job=oracle mib={mib} writers=1 {more}")).vcpus(vcpus)
}

#[test]
fn a_parent_is_forked_five_times_and_writes_in_between() {
    need_kvm!();
    let vm = hot_oracle(2, "").boot();
    vm.wait_ready(LONG).unwrap();
    for fork in 1..=5 {
        let clones = vm.fork(CloneSpec::new(2)).unwrap();
        for clone in &clones {
            assert_eq!(clone.identity().fork_count, fork);
            expect_end(&vm, clone.member(), End::Exited(0));
        }
        expect_oracle_ok(&vm, vm.member(), fork);
    }
    finish_oracle(&vm, vm.member());
    let names: Vec<_> = vm
        .log
        .clones()
        .iter()
        .map(|clone| clone.name().to_owned())
        .collect();
    let expected: Vec<_> = (1..=10).map(|number| format!("vm.{number}")).collect();
    assert_eq!(
        names, expected,
        "no two clones of a parent have a name in common"
    );
    let generation = |member: &Arc<Member>| member.identity().generation;
    let clones = vm.log.clones();
    let generations: BTreeSet<_> = clones.iter().chain([vm.member()]).map(generation).collect();
    assert_eq!(generations.len(), 11, "nor a generation id");
}

#[test]
fn a_second_remap_is_refused_by_name_and_the_vm_runs_on() {
    need_kvm!();
    let vm = hot_oracle(1, "").boot();
    vm.wait_ready(LONG).unwrap();
    let remap = CloneSpec {
        freeze: FreezeKind::Remap,
        ..CloneSpec::new(1)
    };
    let first = vm.fork(remap.clone()).unwrap();
    expect_end(&vm, first[0].member(), End::Exited(0));
    expect_oracle_ok(&vm, vm.member(), 1);

    let refused = vm.fork(remap).err().unwrap();
    let Error::Member(MemberError::Fork(ForkError::Freeze(FreezeError::AlreadyPrivate))) = refused
    else {
        panic!("{refused:?}");
    };

    // Fork count 2: the fork that was refused is none.
    let copy = CloneSpec {
        freeze: FreezeKind::Copy,
        ..CloneSpec::new(1)
    };
    let second = vm.fork(copy).unwrap();
    expect_end(&vm, second[0].member(), End::Exited(0));
    expect_oracle_ok(&vm, vm.member(), 2);
    finish_oracle(&vm, vm.member());
}

#[test]
fn a_clone_cannot_be_remapped_but_forked() {
    need_kvm!();
    let vm = hot_oracle(1, "go-on=1").boot();
    vm.wait_ready(LONG).unwrap();
    let clone = vm.fork(CloneSpec::new(1)).unwrap().remove(0);
    expect_oracle_ok(&vm, clone.member(), 1);
    let remap = CloneSpec {
        freeze: FreezeKind::Remap,
        ..CloneSpec::new(1)
    };
    let refused = clone.fork(remap).err().unwrap();
    let text = with_causes(&refused);
    assert!(
        text.contains("remap needs a VM that still maps its memory shared"),
        "{text}"
    );
    let grandchild = clone.fork(CloneSpec::new(1)).unwrap().remove(0);
    assert_eq!(grandchild.identity().name, "vm.1.1");
    assert_eq!(grandchild.identity().depth, 2);
    expect_oracle_ok(&vm, grandchild.member(), 2);
    expect_oracle_ok(&vm, clone.member(), 2);
    for member in [grandchild.member(), clone.member(), vm.member()] {
        finish_oracle(&vm, member);
    }
}

#[test]
fn a_fork_of_a_fork_five_deep_sees_what_all_its_ancestors_wrote() {
    need_kvm!();
    let vm = Setup::new("job=tree depth=5 mib=1").boot();
    expect_end(&vm, vm.member(), End::Exited(5));
    let clones = vm.log.clones();
    let mut depths: Vec<_> = clones.iter().map(|clone| clone.identity().depth).collect();
    depths.sort_unstable();
    assert_eq!(depths, [1, 2, 3, 4, 5]);
    for clone in &clones {
        expect_end(&vm, clone, End::Exited(5 - clone.identity().depth));
    }
}

/// Host forks at every depth, of guests that all go on writing.
#[test]
fn five_generations_of_hot_writers_run_side_by_side() {
    need_kvm!();
    let vm = hot_oracle(1, "go-on=1").boot();
    vm.wait_ready(LONG).unwrap();
    let mut line = vec![vm.member().clone()];
    for generation in 1..=5 {
        let youngest = line.last().unwrap().clone();
        let ticket = youngest.fork(CloneSpec::new(1)).unwrap();
        let clone = ticket.clones[0].clone();
        expect_oracle_ok(&vm, &clone, generation);
        expect_oracle_ok(&vm, &youngest, generation);
        line.push(clone);
    }
    line.iter().for_each(|member| finish_oracle(&vm, member));
}

#[test]
fn a_fork_point_spawns_clones_of_its_instant_after_the_parent_has_gone_on_and_after_it_has_ended() {
    need_kvm!();
    let vm = hot_oracle(2, "").boot();
    vm.wait_ready(LONG).unwrap();
    let point = vm.fork_point(CloneSpec::new(1)).unwrap();
    // The parent has rewritten its pages since, and says so.
    expect_oracle_ok(&vm, vm.member(), 1);
    std::thread::sleep(Duration::from_millis(20));

    let later = point.spawn(2).unwrap();
    later
        .iter()
        .for_each(|clone| expect_end(&vm, clone, End::Exited(0)));
    finish_oracle(&vm, vm.member());

    let after_the_end = point.spawn(1).unwrap();
    expect_end(&vm, &after_the_end[0], End::Exited(0));
    let ids: Vec<_> = vm
        .log
        .clones()
        .iter()
        .map(|clone| clone.identity().clone_id)
        .collect();
    assert_eq!(ids, [1, 2, 3]);
}

#[test]
fn a_stopped_parent_leaves_a_fork_point_that_clones_are_spawned_from() {
    need_kvm!();
    let vm = hot_oracle(1, "").boot();
    vm.wait_ready(LONG).unwrap();
    let stop = CloneSpec {
        freeze: FreezeKind::Stop,
        ..CloneSpec::new(1)
    };
    let point = vm.fork_point(stop).unwrap();
    expect_end(&vm, vm.member(), End::Stopped);
    for _ in 0..2 {
        let clones = point.spawn(1).unwrap();
        expect_end(&vm, &clones[0], End::Exited(0));
    }
}

#[test]
fn clones_outlive_their_parent() {
    need_kvm!();
    let vm = hot_oracle(1, "go-on=1").boot();
    vm.wait_ready(LONG).unwrap();
    let clones = vm.fork(CloneSpec::new(2)).unwrap();
    vm.kill();
    expect_end(&vm, vm.member(), End::Killed);
    for clone in &clones {
        expect_oracle_ok(&vm, clone.member(), 1);
        finish_oracle(&vm, clone.member());
    }
}

/// Notes the names of VMs in the order in which they go.
#[derive(Clone, Default)]
struct Obituaries(Arc<Mutex<Vec<String>>>);

/// The console of a VM, which goes with it.
struct Obituary {
    name: String,
    all: Obituaries,
}

impl Consoles for Obituaries {
    fn open(&self, vm: &Identity) -> io::Result<Box<dyn Write + Send>> {
        let (name, all) = (vm.name.clone(), self.clone());
        Ok(Box::new(Obituary { name, all }))
    }
}

impl Write for Obituary {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Obituary {
    fn drop(&mut self) {
        self.all.0.lock().unwrap().push(self.name.clone());
    }
}

#[test]
fn a_family_ends_deepest_first() {
    need_kvm!();
    let order = Obituaries::default();
    let vm = hot_oracle(1, "go-on=1").consoles(order.clone()).boot();
    vm.wait_ready(LONG).unwrap();
    let clone = vm.fork(CloneSpec::new(1)).unwrap().remove(0);
    let grandchild = clone.fork(CloneSpec::new(1)).unwrap().remove(0);
    vm.family().end();
    for member in [vm.member(), clone.member(), grandchild.member()] {
        expect_end(&vm, member, End::Killed);
    }
    assert!(vm.family().running().is_empty());
    assert_eq!(*order.0.lock().unwrap(), ["vm.1.1", "vm.1", "vm"]);
}

#[test]
fn a_vm_that_has_ended_cannot_be_forked_and_says_how_it_ended() {
    need_kvm!();
    let vm = Setup::new("job=hello").boot();
    expect_end(&vm, vm.member(), End::Exited(0));
    let error = vm.fork(CloneSpec::new(1)).err().unwrap();
    assert!(
        matches!(
            &error,
            Error::Member(MemberError::Ended {
                end: End::Exited(0),
                ..
            })
        ),
        "{error:?}"
    );
}

#[test]
fn the_phases_of_a_fork_are_logged_in_their_order() {
    need_kvm!();
    let vm = Setup::new("job=touch mib=1").boot();
    vm.wait_ready(LONG).unwrap();
    let clones = vm.fork(CloneSpec::new(1)).unwrap();
    expect_end(&vm, clones[0].member(), End::Exited(0));
    let phases: Vec<_> = vm.log.phases().iter().map(|(phase, _)| *phase).collect();
    assert_eq!(phases, Phase::ALL);
    let reported = clones[0].member().reports();
    assert_eq!(
        reported.first().map(|(value, _)| *value),
        Some(report::ACTION)
    );
}
