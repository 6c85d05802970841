//! Memory, registers and counters over a save.

use forkvm::End;
use forkvm::abi::doorbell::report;
use tempfile::tempdir;

use super::common::{LONG, need_kvm};
use super::home::{Home, names_in};

#[test]
fn a_restored_machine_has_all_its_memory_registers_and_counters() {
    need_kvm!();
    for vcpus in [1, 2, 4] {
        let dir = tempdir().unwrap();
        let saved = dir.path().join("saved");
        let home = Home::saving_to(&saved);
        let vm = home.boot(vcpus, None, "job=oracle mib=4 writers=1");
        vm.save().unwrap();
        assert_eq!(vm.wait().end, End::Saved);

        let home = Home::saving_to(&dir.path().join("again"));
        let vm = home.restore(&saved);
        home.expect_well(&home.verify_by_a_fork(&vm));
        home.quit(&vm);
    }
}

#[test]
fn a_forked_parent_and_a_clone_are_saved_with_the_memory_that_each_sees() {
    need_kvm!();
    let dir = tempdir().unwrap();
    let saved = dir.path().join("saved");
    let home = Home::saving_to(&saved);
    let vm = home.boot(2, None, "job=oracle mib=4 writers=1 go-on=1");
    let clone = home.verify_by_a_fork(&vm);
    clone.wait_report(report::USER + 1, 1, LONG).unwrap();
    // A clone that is saved does not take its parent's place.
    clone.save().unwrap();
    vm.save().unwrap();
    assert_eq!(names_in(dir.path()), ["saved", "saved-vm.1"]);

    for name in ["saved", "saved-vm.1"] {
        let home = Home::saving_to(&dir.path().join("again"));
        let vm = home.restore(&dir.path().join(name));
        let identity = vm.identity();
        assert_eq!(
            (identity.fork_count, identity.depth, identity.clone_id),
            (1, 0, 0)
        );
        let clone = home.verify_by_a_fork(&vm);
        clone.wait_report(report::USER + 2, 1, LONG).unwrap();
        home.quit(&clone);
        home.quit(&vm);
    }
}

#[test]
fn a_save_that_fails_leaves_the_machine_running_and_nothing_on_disk() {
    need_kvm!();
    let dir = tempdir().unwrap();
    let home = Home::saving_to(&dir.path().join("no/such/place"));
    let vm = home.boot(1, None, "job=oracle mib=1");
    vm.save().unwrap_err();
    assert!(names_in(dir.path()).is_empty());
    home.expect_well(&home.verify_by_a_fork(&vm));
    home.quit(&vm);
}
