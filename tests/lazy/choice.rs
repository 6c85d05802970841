//! Which freeze `auto` chooses, and which pairs of freeze and memory mode are refused.

use forkvm::engine::freeze::FreezeError;
use forkvm::engine::{ForkError, MemberError};
use forkvm::{Error, FreezeKind, MemoryMode};

use crate::common::{Guest, LONG, Setup, fork_by, need_kvm};

const MODES: [MemoryMode; 2] = [MemoryMode::Cow, MemoryMode::Lazy];

fn booted() -> Guest {
    let vm = Setup::new("job=oracle mib=1 go-on=1").boot();
    vm.wait_ready(LONG).unwrap();
    vm
}

fn refused(vm: &Guest, freeze: FreezeKind, mode: MemoryMode) -> FreezeError {
    match vm.fork(fork_by(freeze, mode, 1)).err() {
        Some(Error::Member(MemberError::Fork(ForkError::Freeze(why)))) => why,
        other => panic!("{freeze} for {}: {other:?}", mode.as_str()),
    }
}

#[test]
fn auto_protects_a_booted_vm_whose_clones_are_lazy_and_remaps_one_whose_clones_are_not() {
    need_kvm!();
    for (mode, chosen) in [
        (MemoryMode::Lazy, FreezeKind::WriteProtect),
        (MemoryMode::Cow, FreezeKind::Remap),
    ] {
        let point = booted()
            .fork_point(fork_by(FreezeKind::Auto, mode, 1))
            .unwrap();
        assert_eq!((point.freeze(), point.memory_mode()), (chosen, mode));
    }
}

#[test]
fn auto_takes_the_delta_of_clones_and_of_parents_that_were_remapped() {
    need_kvm!();
    let vm = booted();
    let clone = vm
        .fork(fork_by(FreezeKind::Remap, MemoryMode::Cow, 1))
        .unwrap()
        .remove(0);
    for mode in MODES {
        for member in [vm.member(), clone.member()] {
            let point = member
                .fork_point(fork_by(FreezeKind::Auto, mode, 1))
                .unwrap();
            assert_eq!(
                (point.freeze(), point.memory_mode()),
                (FreezeKind::Delta, mode)
            );
        }
    }
}

#[test]
fn a_memory_mode_that_a_freeze_cannot_give_is_refused_by_name_and_the_vm_runs_on() {
    need_kvm!();
    let vm = booted();
    for freeze in FreezeKind::ALL {
        for mode in MODES {
            if freeze.serves().contains(&mode) {
                continue;
            }
            let why = refused(&vm, freeze, mode);
            assert!(matches!(why, FreezeError::Pair { .. }), "{why:?}");
            let said = why.to_string();
            assert!(
                said.contains(&format!("freeze {freeze}")) && said.contains(mode.as_str()),
                "{said}"
            );
        }
    }
    vm.fork(fork_by(FreezeKind::Auto, MemoryMode::Lazy, 1))
        .unwrap();
}

#[test]
fn a_freeze_that_does_not_suit_how_the_vm_maps_its_memory_is_refused_and_the_vm_runs_on() {
    need_kvm!();
    let vm = booted();
    let why = refused(&vm, FreezeKind::Delta, MemoryMode::Lazy);
    assert!(matches!(why, FreezeError::Shared), "{why:?}");
    vm.fork(fork_by(FreezeKind::Remap, MemoryMode::Cow, 1))
        .unwrap();
    let why = refused(&vm, FreezeKind::WriteProtect, MemoryMode::Lazy);
    assert!(matches!(why, FreezeError::Private), "{why:?}");
    vm.fork(fork_by(FreezeKind::Delta, MemoryMode::Lazy, 1))
        .unwrap();
}
