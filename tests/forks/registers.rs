//! A guest fills every register class of every vCPU and forks itself by one `out`: parent and
//! clones find every register as it was.

use forkvm::End;

use crate::common::{Setup, expect_end, need_kvm};

fn check(vcpus: u32) {
    need_kvm!();
    let vm = Setup::new("job=registers n=2 seed=7").vcpus(vcpus).boot();
    expect_end(&vm, vm.member(), End::Exited(0));
    let clones = vm.log.clones();
    assert_eq!(clones.len(), 2);
    clones
        .iter()
        .for_each(|clone| expect_end(&vm, clone, End::Exited(0)));
    let said = vm.consoles.text().matches("registers ok").count();
    assert_eq!(
        said,
        3,
        "parent and clones compared them\n{}",
        vm.consoles.text()
    );
}

#[test]
fn survive_a_fork_on_1_vcpu() {
    check(1);
}

#[test]
fn survive_a_fork_on_2_vcpus() {
    check(2);
}

/// The instruction at which a vCPU is stopped is done once, whichever it is.
#[test]
fn no_vcpu_loses_or_repeats_a_step() {
    need_kvm!();
    let vm = Setup::new("job=counter n=2").vcpus(2).boot();
    expect_end(&vm, vm.member(), End::Exited(0));
    vm.log
        .clones()
        .iter()
        .for_each(|clone| expect_end(&vm, clone, End::Exited(0)));
}
