//! The fork call from inside the guest.

mod common;

use common::{boot, LONG};
use forkvm::End;

#[test]
fn a_guest_forks_itself_and_joins_its_clones() {
    let vm = boot("parent", 64, 1, "job=fork n=3 mib=4");
    let log = vm.log.clone();
    let end = vm.join().end;
    assert_eq!(end, End::Exited(3), "JOIN answers the worst status\n{}", vm.consoles.text());
    let clones = log.clones();
    let ends: Vec<_> = clones.iter().map(|clone| clone.wait_for(LONG).unwrap().end).collect();
    assert_eq!(ends, [End::Exited(1), End::Exited(2), End::Exited(3)]);
    for clone in &clones {
        let t = clone.timeline();
        println!("{}: {:?}", clone.name(), t.first_action.unwrap() - t.spawn_requested.unwrap());
    }
    for (phase, took) in log.phases() { println!("{phase} {took:?}"); }
}
