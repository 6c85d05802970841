//! The fork call from inside the guest.

use forkvm::End;

use crate::common::{self, LONG, need_kvm};

#[test]
fn a_guest_forks_itself_and_joins_its_clones() {
    need_kvm!();
    let vm = common::boot("parent", 64, 1, "job=fork n=3 mib=4");
    assert_eq!(
        vm.join().end,
        End::Exited(3),
        "the worst status\n{}",
        vm.consoles.text()
    );
    let clones = vm.log.clones();
    let ends: Vec<_> = clones
        .iter()
        .map(|clone| clone.wait_for(LONG).unwrap().end)
        .collect();
    assert_eq!(ends, [End::Exited(1), End::Exited(2), End::Exited(3)]);
    let names: Vec<_> = clones.iter().map(|clone| clone.name()).collect();
    assert_eq!(names, ["parent.1", "parent.2", "parent.3"]);
}

#[test]
fn the_end_points_of_a_clones_start_are_passed_in_order() {
    need_kvm!();
    let vm = common::boot("parent", 64, 1, "job=fork n=1");
    vm.join();
    let line = vm.log.clones()[0].timeline();
    let points = [
        line.fork_requested,
        line.spawn_requested,
        line.built,
        line.restored,
        line.first_run,
        line.first_action,
    ];
    assert!(points.iter().all(Option::is_some), "{line:?}");
    assert!(points.is_sorted(), "{line:?}");
}
