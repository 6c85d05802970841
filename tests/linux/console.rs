//! The virtio console, which machines of the template have as `/dev/console`, with a shell on it.

use std::time::{Duration, Instant};

use forkvm::CloneSpec;
use forkvm::linux::LinuxVm;

use super::common::need_kvm;
use super::machine::{Machine, PATIENCE};

/// Types a line to the shell on the console of `vm`, whose answer is more than its echo.
fn type_to(vm: &LinuxVm) {
    let typed = b"echo the answer is $((40 + 2))\n";
    let taken = vm.member().console_input(typed).unwrap();
    assert_eq!(taken, typed.len());
}

/// Waits for the answer of `vm` on its console: what a VM prints is kept behind its name.
fn expect_answer(machine: &Machine, vm: &LinuxVm) {
    let line = format!("{}: the answer is 42", vm.identity().name);
    let start = Instant::now();
    while !machine.consoles.text().contains(&line) {
        assert!(start.elapsed() < PATIENCE, "{}", machine.consoles.text());
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn each_of_a_family_is_typed_to_on_a_virtio_console_of_its_own() {
    need_kvm!();
    let machine = Machine::restore(1);
    let clones = machine.fork(CloneSpec::new(1));
    type_to(&clones[0]);
    expect_answer(&machine, &clones[0]);
    let of_the_parent = format!("{}: the answer", machine.identity().name);
    assert!(!machine.consoles.text().contains(&of_the_parent));
    type_to(&machine.vm);
    expect_answer(&machine, &machine.vm);
}
