//! The virtio console, which machines of the template have as `/dev/console`.

use std::time::{Duration, Instant};

use forkvm::CloneSpec;
use forkvm::linux::LinuxVm;

use super::common::need_kvm;
use super::machine::{Machine, PATIENCE, sh};

/// Types a line to `vm`, whose console is a terminal, and has a program read it there.
fn reads_what_is_typed(vm: &LinuxVm, word: &str) {
    let typed = format!("{word}\n");
    let taken = vm.member().console_input(typed.as_bytes()).unwrap();
    assert_eq!(taken, typed.len());
    let script = "read -r line < /dev/hvc0; echo \"read $line\"";
    assert_eq!(sh(vm, script), format!("read {word}"));
}

#[test]
fn each_of_a_family_prints_and_reads_on_a_virtio_console_of_its_own() {
    need_kvm!();
    let machine = Machine::restore(1);
    reads_what_is_typed(&machine.vm, "before");
    let clones = machine.fork(CloneSpec::new(1));
    let everybody = || clones.iter().chain([&machine.vm]);
    for vm in everybody() {
        let name = vm.identity().name;
        reads_what_is_typed(vm, &format!("typed-to-{name}"));
        sh(vm, &format!("echo 'printed by {name}' > /dev/hvc0"));
    }
    // What a VM prints is kept behind its name.
    let whole = |text: &str| {
        everybody().all(|vm| {
            let name = vm.identity().name;
            let printed = format!("printed by {name}");
            text.lines()
                .any(|line| line.starts_with(&format!("{name}: ")) && line.contains(&printed))
        })
    };
    let start = Instant::now();
    while !whole(&machine.consoles.text()) {
        assert!(start.elapsed() < PATIENCE, "{}", machine.consoles.text());
        std::thread::sleep(Duration::from_millis(50));
    }
}
