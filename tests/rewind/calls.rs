//! Calls of the guest over a rewind.

use std::thread;
use std::time::{Duration, Instant};

use crate::common::{Guest, LONG, Setup, need_kvm};
use crate::ways;

/// Waits until a VM of this name runs.
fn wait_for(vm: &Guest, name: &str) {
    let start = Instant::now();
    while !vm
        .family()
        .running()
        .iter()
        .any(|member| member.name() == name)
    {
        assert!(start.elapsed() < LONG, "no {name}\n{}", vm.consoles.text());
        thread::sleep(Duration::from_millis(1));
    }
}

/// The clone has forked and waits in JOIN for a clone that never ends.
#[test]
fn a_vcpu_that_waits_for_its_clones_is_let_out_and_forks_anew() {
    need_kvm!();
    for way in ways() {
        let vm = Setup::new("job=tree depth=2 mib=1 stay=1").boot();
        wait_for(&vm, "vm.1.1");
        let clone = vm.family().running().remove(1);
        assert_eq!(clone.name(), "vm.1");
        for child in ["vm.1.2", "vm.1.3", "vm.1.4"] {
            clone.rewind(way).unwrap();
            wait_for(&vm, child);
        }
        let running = vm.family().running();
        assert_eq!(running.len(), 6, "the clones of its old lives run on");
        // Those of the old lives are not waited for any more.
        let (of_old, of_new) = (&running[2], &running[5]);
        assert_eq!((of_old.name(), of_new.name()), ("vm.1.1", "vm.1.4"));
        of_old.kill();
        of_old.wait();
        assert!(clone.wait_for(Duration::from_millis(50)).is_none());
        of_new.kill();
        assert!(clone.wait_for(LONG).is_some(), "its JOIN is answered");
    }
}
