//! Registers, devices and disks go back, and so does who a clone is.

use std::fs::{self, File};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use forkvm::abi::doorbell::report;
use forkvm::devices::block::{Access, RawFile};
use forkvm::{CloneSpec, CloneVm, DiskSource, End};

use crate::common::{Guest, LONG, Setup, expect_end, expect_oracle_ok, need_kvm, scaled};
use crate::ways;

/// A clone that keeps memory, registers and disk busy, and has verified all of it.
fn busy_clone(vcpus: u32) -> (tempfile::TempDir, Guest, CloneVm) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.raw");
    File::create(&path).unwrap().set_len(1 << 20).unwrap();
    let disk = DiskSource::Raw(Arc::new(RawFile::open(&path, Access::ReadWrite).unwrap()));
    let vm = Setup::new("job=oracle mib=1 writers=1 disk=1 go-on=1")
        .vcpus(vcpus)
        .disk(disk)
        .boot();
    vm.wait_ready(LONG).unwrap();
    let clone = vm.fork(CloneSpec::new(1)).unwrap().remove(0);
    expect_oracle_ok(&vm, clone.member(), 1);
    (folder, vm, clone)
}

/// What the clone writes after each rewind is marked by its generation id, so nothing of another life
/// passes for its own.
fn memory_registers_and_disk_go_back(vcpus: u32) {
    for way in ways() {
        let (_folder, vm, clone) = busy_clone(vcpus);
        for round in 0..u64::from(scaled(20, 4)) {
            thread::sleep(Duration::from_micros(700 * round));
            clone.rewind_by(way).unwrap();
            expect_oracle_ok(&vm, clone.member(), 1);
        }
        clone.member().console_input(b"q").unwrap();
        expect_end(&vm, clone.member(), End::Exited(0));
        // Its parent was not touched.
        vm.member().console_input(b"q").unwrap();
        expect_end(&vm, vm.member(), End::Exited(0));
    }
}

#[test]
fn memory_registers_and_disk_go_back_on_1_vcpu() {
    need_kvm!();
    memory_registers_and_disk_go_back(1);
}

#[test]
fn memory_registers_and_disk_go_back_on_2_vcpus() {
    need_kvm!();
    memory_registers_and_disk_go_back(2);
}

#[test]
fn a_clone_whose_parent_and_disk_file_are_gone_goes_back() {
    need_kvm!();
    for way in ways() {
        let (folder, vm, clone) = busy_clone(1);
        vm.kill();
        expect_end(&vm, vm.member(), End::Killed);
        for entry in fs::read_dir(folder.path()).unwrap() {
            fs::remove_file(entry.unwrap().path()).unwrap();
        }
        for _ in 0..3 {
            clone.rewind_by(way).unwrap();
            expect_oracle_ok(&vm, clone.member(), 1);
        }
        clone.member().console_input(b"q").unwrap();
        expect_end(&vm, clone.member(), End::Exited(0));
    }
}

/// The vCPU that forked goes on behind its `out` with every register class as it was, and the others
/// hold theirs.
fn every_register_goes_back(vcpus: u32) {
    for way in ways() {
        let vm = Setup::new("job=registers n=1 seed=3 stay=1")
            .vcpus(vcpus)
            .boot();
        let start = std::time::Instant::now();
        while vm.log.clones().is_empty() {
            assert!(start.elapsed() < LONG, "{}", vm.consoles.text());
            thread::sleep(Duration::from_millis(1));
        }
        let clone = vm.log.clones().remove(0);
        for _ in 0..scaled(10, 3) {
            if let Err(error) = clone.wait_report(report::ANSWER, 1, LONG) {
                panic!("{error}\n{}", vm.consoles.text());
            }
            clone.rewind(way).unwrap();
        }
        clone.kill();
        expect_end(&vm, vm.member(), End::Exited(137));
    }
}

#[test]
fn every_register_goes_back_on_1_vcpu() {
    need_kvm!();
    every_register_goes_back(1);
}

#[test]
fn every_register_goes_back_on_2_vcpus() {
    need_kvm!();
    every_register_goes_back(2);
}

#[test]
fn a_clone_keeps_its_name_and_number_and_begins_another_life() {
    need_kvm!();
    for way in ways() {
        let vm = Setup::new("job=touch mib=1 idle=1").boot();
        vm.wait_ready(LONG).unwrap();
        let clone = vm.fork(CloneSpec::new(2)).unwrap().remove(1);
        clone.member().wait_report(report::ACTION, 1, LONG).unwrap();
        let (before, timeline) = (clone.identity(), clone.timeline());
        clone.rewind_by(way).unwrap();
        let after = clone.identity();
        assert_eq!((&after.name, after.clone_id), (&before.name, 2));
        assert_eq!(after.fork_count, before.fork_count);
        assert_ne!(after.generation, before.generation);
        if clone.member().process().is_none() {
            let told = clone
                .member()
                .with_paused(|paused| paused.doorbell().generation());
            assert_eq!(told.unwrap(), after.generation);
        }
        // The reports of the old life are forgotten: the first one of this life is the first.
        clone.member().wait_report(report::ACTION, 1, LONG).unwrap();
        assert_eq!(clone.member().reports().len(), 1);
        let again = clone.timeline();
        assert!(again.spawn_requested > timeline.first_action);
        assert!(again.first_run > again.spawn_requested && again.first_action > again.first_run);
    }
}
