//! VMs that their owner holds: nothing but his word makes them go on.

use std::thread;
use std::time::{Duration, Instant};

use forkvm::engine::MemberError;
use forkvm::{CloneSpec, End, FreezeKind, MemoryMode};

use crate::common::{LONG, Obedient, Setup, fork_by, need_kvm};

#[test]
fn a_held_vm_stands_through_all_that_is_asked_of_it_and_goes_on_where_it_stood() {
    need_kvm!();
    let vm = Setup::new("job=obey pages=16").boot();
    vm.wait_ready(LONG).unwrap();
    let mut clones = vm.fork(CloneSpec::new(2)).unwrap();
    let (first, other) = (clones.remove(0), clones.remove(0));
    // The parent lives here; the clone wherever those of this run do.
    for member in [vm.member(), first.member()] {
        Obedient::new(&vm, member).write(3, 33, 1);
        member.pause().unwrap();
        assert!(member.is_paused());
        let mut held = Obedient::new(&vm, member);
        member.memory_use().unwrap();
        assert!(matches!(member.save(), Err(MemberError::Save(_))));
        let before = vm.consoles.len();
        for (freeze, mode) in [
            (FreezeKind::Auto, MemoryMode::Cow),
            (FreezeKind::Copy, MemoryMode::Cow),
        ] {
            let clone = member
                .fork(fork_by(freeze, mode, 1))
                .unwrap()
                .clones
                .remove(0);
            assert!(!clone.is_paused(), "the clones run");
            let mut obedient = Obedient::new(&vm, &clone);
            obedient.expect(3, 33, 1);
            obedient.write(3, 44, 1);
            obedient.exit();
        }
        assert!(member.is_paused());
        assert_eq!(member.console_input(b"r 3 1\n").unwrap(), 6);
        // Asked later, and answers.
        Obedient::new(&vm, other.member()).expect(3, 0, 1);
        let own = |text: &str| {
            let prefix = format!("{}: ", member.name());
            text.lines().any(|line| line.starts_with(&prefix))
        };
        assert!(
            !own(&vm.consoles.text_from(before)),
            "{}",
            vm.consoles.text()
        );
        member.resume().unwrap();
        assert!(!member.is_paused());
        assert_eq!(held.answer("r 3 1"), ["= 3 33"]);
    }
}

#[test]
fn a_held_vm_can_be_killed_and_stopped_at_a_fork_point() {
    need_kvm!();
    let vm = Setup::new("job=obey pages=16").boot();
    vm.wait_ready(LONG).unwrap();
    let mut clones = vm.fork(CloneSpec::new(2)).unwrap();
    let (killed, stopped) = (clones.remove(0), clones.remove(0));
    killed.member().pause().unwrap();
    killed.kill();
    assert_eq!(killed.join().end, End::Killed);
    assert!(matches!(
        killed.member().pause(),
        Err(MemberError::Ended { .. })
    ));

    stopped.member().pause().unwrap();
    let stop = fork_by(FreezeKind::Stop, MemoryMode::Cow, 1);
    let clone = stopped.member().fork(stop).unwrap().clones.remove(0);
    assert_eq!(stopped.join().end, End::Stopped);
    Obedient::new(&vm, &clone).exit();

    vm.member().pause().unwrap();
    vm.family().end();
    assert_eq!(vm.join().end, End::Killed);
}

#[test]
fn what_a_guest_waits_for_is_answered_when_it_is_resumed() {
    need_kvm!();
    // Each VM but the last waits for its clone in JOIN.
    let vm = Setup::new("job=tree depth=2 mib=1 stay=1").boot();
    let start = Instant::now();
    while vm.family().running().len() < 3 {
        assert!(start.elapsed() < LONG, "{}", vm.consoles.text());
        thread::sleep(Duration::from_millis(1));
    }
    let running = vm.family().running();
    for held in &running[..2] {
        held.pause().unwrap();
    }
    running[2].kill();
    running[2].wait();
    assert!(running[1].wait_for(Duration::from_millis(50)).is_none());
    assert!(running[1].is_paused());
    running[1].resume().unwrap();
    assert!(running[1].wait_for(LONG).is_some(), "its JOIN is answered");
    assert!(running[0].wait_for(Duration::from_millis(50)).is_none());
    running[0].resume().unwrap();
    assert!(running[0].wait_for(LONG).is_some());
}
