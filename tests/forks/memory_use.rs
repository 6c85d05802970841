//! What the engine says that VMs take, against what their guests did.

use forkvm::CloneSpec;
use forkvm::abi::doorbell::report;
use forkvm::engine::Member;
use forkvm::engine::accounting::{MemoryUse, ProcessUse};

use crate::common::{Guest, LONG, Setup, need_kvm, scaled};

/// What an idle guest may write itself: stack, its clone's share of the doorbell, counters.
const IDLE_KIB: u64 = 128;

fn boot(job: &str, memory_mib: u64) -> Guest {
    // Shells that are being built would be counted with the clones.
    let vm = Setup::new(job).memory_mib(memory_mib).pool(0).boot();
    vm.wait_ready(LONG).unwrap();
    vm
}

fn use_after(clone: &Member, report: u32) -> MemoryUse {
    clone.wait_report(report, 1, LONG).unwrap();
    clone.memory_use().unwrap()
}

#[test]
fn private_memory_of_a_clone_is_what_it_has_written() {
    need_kvm!();
    for mib in [1, u64::from(scaled(16, 2))] {
        let vm = boot(&format!("job=touch mib=32 idle=1 redirty={mib}"), 128);
        let clone = vm.fork(CloneSpec::new(1)).unwrap().remove(0);
        let taken = use_after(clone.member(), report::READY);
        let written = mib * 1024;
        assert!(
            (written..=written + IDLE_KIB).contains(&taken.private_kib),
            "{mib} MiB were written: {taken:?}"
        );
    }
}

#[test]
fn a_clone_that_only_reads_shares_what_it_reads_and_has_next_to_nothing_of_its_own() {
    need_kvm!();
    let pages = u64::from(scaled(4096, 512));
    let vm = boot(&format!("job=reach mib=32 touch={pages}"), 128);
    let clone = vm.fork(CloneSpec::new(1)).unwrap().remove(0);
    let taken = use_after(clone.member(), report::ANSWER);
    assert!(taken.private_kib <= IDLE_KIB, "{taken:?}");
    assert!(taken.shared_kib >= pages * 4, "{taken:?}");
    // A page of each kind of table for each 512 pages, ours and KVM's.
    let tables = pages / 512 * 4;
    assert!(taken.page_tables_kib >= tables, "{taken:?}");
    assert!(taken.kernel.paging_kib.unwrap() >= tables, "{taken:?}");
}

#[test]
fn a_vm_that_was_booted_has_its_memory_in_a_file_until_it_is_forked() {
    need_kvm!();
    let vm = boot("job=touch mib=16 idle=1", 64);
    let (taken, family) = (
        vm.member().memory_use().unwrap(),
        vm.family().memory_use().unwrap(),
    );
    assert_eq!(taken.private_kib, 0, "{taken:?}");
    assert!(family.files_kib >= 16 * 1024, "{family:?}");
    assert_eq!(family.guest_kib(), family.files_kib, "{family:?}");
}

#[test]
fn an_image_counts_once_however_many_clones_map_it() {
    need_kvm!();
    let vm = boot("job=touch mib=16 idle=1", 64);
    let before = vm.family().memory_use().unwrap();
    let clones = vm.fork(CloneSpec::new(8)).unwrap();
    for clone in &clones {
        clone.member().wait_report(report::ACTION, 1, LONG).unwrap();
    }
    let family = vm.family().memory_use().unwrap();
    assert_eq!(family.members.len(), 9, "{family:?}");
    // By remap: the file is the parent's as before, and a hole that is read is a page of it.
    assert!(
        (before.files_kib..before.files_kib + 1024).contains(&family.files_kib),
        "{before:?}, then {family:?}"
    );
    let private = family.guest_kib() - family.files_kib;
    assert!(private <= 9 * IDLE_KIB, "{family:?}");
    for clone in &clones {
        clone.kill();
        clone.join();
    }
    assert_eq!(vm.family().memory_use().unwrap().members.len(), 1);
}

#[test]
fn the_image_of_a_fork_point_without_clones_counts_until_it_is_dropped() {
    need_kvm!();
    let vm = boot("job=touch mib=16 idle=1", 64);
    let copy = CloneSpec {
        freeze: forkvm::FreezeKind::Copy,
        ..CloneSpec::new(1)
    };
    let held = || vm.family().memory_use().unwrap().files_kib;
    let before = held();
    let point = vm.fork_point(copy).unwrap();
    let with = held();
    assert!(
        (before + 16 * 1024..=2 * before).contains(&with),
        "{before}, then {with}"
    );
    drop((point, vm.log.clones()));
    assert_eq!(held(), before);
}

/// What `count` idle clones of a parent that has populated `mib` MiB take each, of their own: by the
/// engine, and by the growth of the process.
fn private_kib_of_idle_clones(mib: u64, count: u32) -> (u64, u64) {
    let vm = boot(&format!("job=touch mib={mib} idle=1"), mib + 32);
    let spec = CloneSpec {
        expected_write_mib: 0,
        ..CloneSpec::new(1)
    };
    let point = vm.fork_point(spec).unwrap();
    // The allocator's own, once.
    use_after(&point.spawn(1).unwrap()[0], report::ACTION);
    let before = ProcessUse::now().unwrap();
    let clones = point.spawn(count).unwrap();
    let uses = clones.iter().map(|clone| use_after(clone, report::ACTION));
    let counted: u64 = uses.map(|taken| taken.private_kib).sum();
    let grown = ProcessUse::now().unwrap().anonymous_kib - before.anonymous_kib;
    (counted / u64::from(count), grown / u64::from(count))
}

#[test]
fn private_memory_of_idle_clones_does_not_grow_with_their_parent() {
    need_kvm!();
    let count = scaled(100, 4);
    let (small, large) = (
        private_kib_of_idle_clones(u64::from(scaled(64, 16)), count),
        private_kib_of_idle_clones(u64::from(scaled(512, 128)), count),
    );
    println!("{count} clones, (counted, grown) KiB each: {small:?}, {large:?} of 8 times as much");
    assert!(large.0 <= 2 * small.0, "counted: {small:?} {large:?}");
    // Pages that the allocator and the stacks of threads take come in a few steps.
    assert!(large.1 <= 2 * small.1 + 32, "grown: {small:?} {large:?}");
    assert!(large.1 <= 300, "the goal is 0.3 MiB: {large:?}");
}
