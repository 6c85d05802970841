//! Pages that nobody has: they are zero for whoever touches them, whatever lies around them.

use std::sync::Arc;

use forkvm::abi::doorbell::report;
use forkvm::engine::Member;
use forkvm::{FreezeKind, MemoryMode};

use crate::common::{Guest, LONG, Obedient, Setup, fork_by, need_kvm};

/// 64 pages of it are written, and nothing is copied in the background.
fn written() -> Guest {
    let vm = Setup::new("job=obey pages=4096").no_copier().boot();
    vm.wait_ready(LONG).unwrap();
    Obedient::new(&vm, vm.member()).write(0, 5, 64);
    vm
}

fn clone_of(parent: &Member, freeze: FreezeKind, mode: MemoryMode) -> Arc<Member> {
    let ticket = parent.fork(fork_by(freeze, mode, 1)).unwrap();
    let clone = ticket.clones[0].clone();
    clone.wait_report(report::ACTION, 1, LONG).unwrap();
    clone
}

#[track_caller]
fn expect_zero(vm: &Guest, member: &Arc<Member>, page: u64) {
    let said = Obedient::new(vm, member).say(&format!("r {page} 1"));
    assert_eq!(said, [format!("= {page} 0")]);
}

#[test]
fn a_vm_that_gave_pages_back_after_a_remap_reads_pages_that_it_never_touched() {
    need_kvm!();
    let vm = written();
    let point = vm.fork_point(fork_by(FreezeKind::Remap, MemoryMode::Cow, 1));
    Obedient::new(&vm, vm.member()).say("d 0 1");
    expect_zero(&vm, vm.member(), 2000);
    expect_zero(&vm, vm.member(), 0);
    drop(point);
}

#[test]
fn a_lazy_clone_over_a_whole_image_reads_pages_that_nobody_touched() {
    need_kvm!();
    let vm = written();
    let point = vm.fork_point(fork_by(FreezeKind::Remap, MemoryMode::Cow, 1));
    Obedient::new(&vm, vm.member()).write(100, 7, 10);
    let clone = clone_of(vm.member(), FreezeKind::Delta, MemoryMode::Lazy);
    expect_zero(&vm, &clone, 2000);
    Obedient::new(&vm, &clone).expect(100, 7, 10);
    drop(point);
}

#[test]
fn a_hole_that_reaches_across_images_is_zero_up_to_what_a_later_one_holds() {
    need_kvm!();
    let vm = written();
    let clone = clone_of(vm.member(), FreezeKind::WriteProtect, MemoryMode::Lazy);
    Obedient::new(&vm, &clone).write(1000, 7, 1);
    let grandchild = clone_of(&clone, FreezeKind::Delta, MemoryMode::Lazy);
    expect_zero(&vm, &grandchild, 990);
    Obedient::new(&vm, &grandchild).expect(1000, 7, 1);
    expect_zero(&vm, &grandchild, 1001);
}

/// A delta of a delta, whose writes cross the borders of what is mapped from which image.
#[test]
fn writes_across_images_are_kept_for_the_clones_and_do_not_hold_up_the_parent() {
    need_kvm!();
    let vm = written();
    let clone = clone_of(vm.member(), FreezeKind::WriteProtect, MemoryMode::Lazy);
    Obedient::new(&vm, &clone).write(1000, 700, 20);
    let child = clone_of(&clone, FreezeKind::Delta, MemoryMode::Lazy);
    Obedient::new(&vm, &child).write(990, 900, 40);
    let grandchild = clone_of(&child, FreezeKind::Delta, MemoryMode::Lazy);
    Obedient::new(&vm, &child).write(985, 3000, 60);
    Obedient::new(&vm, &child).say("d 1000 10");
    Obedient::new(&vm, &grandchild).expect(990, 900, 40);
    Obedient::new(&vm, &clone).expect(1000, 700, 20);
    let last = clone_of(&child, FreezeKind::Delta, MemoryMode::Lazy);
    for member in [&child, &last] {
        Obedient::new(&vm, member).expect(985, 3000, 15);
        Obedient::new(&vm, member).expect(1010, 3025, 35);
        expect_zero(&vm, member, 1005);
    }
}
