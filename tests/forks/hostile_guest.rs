//! Guests that break their machine: only that machine ends, by name, and nobody else notices.

use std::io::{self, Write};
use std::time::{Duration, Instant};

use forkvm::engine::{Consoles, Phase, Vetoed};
use forkvm::{CloneSpec, DiskSource, End, Identity};

use crate::common::{
    Guest, LONG, Setup, expect_end, expect_oracle_ok, finish_oracle, need_kvm, scaled,
};
use crate::disks::zeroed_disk;

/// A VM of another family of this process.
fn neighbour() -> Guest {
    let vm = Setup::new("job=oracle mib=2 writers=1").boot();
    vm.wait_ready(LONG).unwrap();
    vm
}

/// The neighbour has not been harmed, and can be forked as ever.
fn expect_unharmed(vm: Guest) {
    let clones = vm.fork(CloneSpec::new(1)).unwrap();
    expect_end(&vm, clones[0].member(), End::Exited(0));
    expect_oracle_ok(&vm, vm.member(), 1);
    finish_oracle(&vm, vm.member());
}

fn triple_fault(vcpus: u32) {
    need_kvm!();
    let vm = Setup::new("job=triple-fault n=3").vcpus(vcpus).boot();
    let clones = || vm.log.clones();
    let asked = Instant::now();
    while clones().len() < 3 {
        assert!(asked.elapsed() < LONG, "{}", vm.consoles.text());
        std::thread::sleep(Duration::from_millis(1));
    }
    expect_end(&vm, &clones()[0], End::TripleFault { vcpu: vcpus - 1 });
    for sibling in &clones()[1..] {
        assert!(
            sibling.wait_for(Duration::ZERO).is_none(),
            "a sibling runs on"
        );
        finish_oracle(&vm, sibling);
    }
    expect_end(&vm, vm.member(), End::Exited(255));
}

#[test]
fn a_triple_fault_ends_only_the_vm_that_has_it() {
    triple_fault(1);
}

#[test]
fn a_triple_fault_of_one_vcpu_ends_all_of_its_vm() {
    triple_fault(2);
}

#[test]
fn rubbish_on_doorbell_queues_and_unmapped_addresses_harms_no_one_else() {
    need_kvm!();
    let neighbour = neighbour();
    let folder = tempfile::tempdir().unwrap();
    let disk = zeroed_disk(folder.path(), 1);
    for seed in 1..=u64::from(scaled(8, 2)) {
        let rounds = scaled(1000, 100);
        println!("seed {seed}");
        let vm = Setup::new(format!("job=rubbish seed={seed} rounds={rounds}"))
            .disk(DiskSource::volatile(disk.clone()))
            .hook(|phase, _| match phase {
                // A guest may ask for clones; here it gets none.
                Phase::Request => Err(Vetoed("not in this test".into())),
                _ => Ok(()),
            })
            .boot();
        // Having had the host write into its own code, it may do anything, such as loop.
        if vm.member().wait_for(Duration::from_secs(5)).is_none() {
            vm.kill();
        }
        println!("seed {seed}: it {}", vm.join().end);
        assert!(vm.log.clones().is_empty());
    }
    expect_unharmed(neighbour);
}

/// A console that takes the thread that writes to it down.
struct Panics;

impl Write for Panics {
    fn write(&mut self, _bytes: &[u8]) -> io::Result<usize> {
        panic!("a console of a test");
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct PanickingConsoles;

impl Consoles for PanickingConsoles {
    fn open(&self, _vm: &Identity) -> io::Result<Box<dyn Write + Send>> {
        Ok(Box::new(Panics))
    }
}

#[test]
fn a_vcpu_thread_that_panics_ends_its_vm_and_is_named() {
    need_kvm!();
    let neighbour = neighbour();
    let vm = Setup::new("job=hello")
        .vcpus(2)
        .consoles(PanickingConsoles)
        .boot();
    let end = vm
        .member()
        .wait_for(LONG)
        .expect("a VM whose thread is gone ends")
        .end;
    let End::Failed(why) = end else {
        panic!("{end:?}")
    };
    assert!(why.contains("vCPU 0") && why.contains("panicked"), "{why}");
    expect_unharmed(neighbour);
}
