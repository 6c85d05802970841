//! Whatever a VM is doing, it can be ended, and whoever waits for it hears so.

use std::thread;
use std::time::Duration;

use forkvm::engine::{MemberError, Phase};
use forkvm::{CloneSpec, End, Error};

use crate::common::{LONG, Setup, need_kvm, scaled};

/// Long for an end, short for a hang.
const SOON: Duration = Duration::from_secs(20);

#[test]
fn a_spinning_clone_that_is_killed_as_it_starts_is_gone() {
    need_kvm!();
    let vm = Setup::new("job=spin").vcpus(2).boot();
    vm.wait_ready(LONG).unwrap();
    let point = vm.fork_point(CloneSpec::new(1)).unwrap();
    for round in 0..scaled(100, 10) {
        let clone = point.spawn(1).unwrap().remove(0);
        // At another point of its start each time.
        thread::sleep(Duration::from_micros(u64::from(round) * 7));
        clone.kill();
        let finished = clone.wait_for(SOON).expect("the clone is gone");
        assert_eq!(finished.end, End::Killed);
    }
}

#[test]
fn an_observer_that_panics_ends_the_vm_it_watched_by_name() {
    need_kvm!();
    let vm = Setup::new("job=spin")
        .hook(|phase, _paused| {
            assert_ne!(phase, Phase::Save, "this panic is the test's");
            Ok(())
        })
        .boot();
    vm.wait_ready(LONG).unwrap();
    let error = vm.fork(CloneSpec::new(1)).err().unwrap();
    let Error::Member(MemberError::Ended {
        end: End::Failed(why),
        ..
    }) = &error
    else {
        panic!("{error:?}");
    };
    assert!(why.contains("panicked"), "{why}");
}

#[test]
fn a_family_that_was_ended_starts_nothing_any_more() {
    need_kvm!();
    let vm = Setup::new("job=spin").boot();
    vm.wait_ready(LONG).unwrap();
    let point = vm.fork_point(CloneSpec::new(1)).unwrap();
    vm.family().end();
    assert_eq!(vm.join().end, End::Killed);
    let error = point.spawn(1).err().unwrap();
    assert!(error.to_string().contains("being ended"), "{error}");
    assert!(vm.family().running().is_empty());
}
