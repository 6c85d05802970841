//! What a freeze costs the parent.

use std::time::Duration;

use forkvm::{FreezeKind, MemoryMode};

use crate::common::{Guest, LONG, Setup, fork_by, full_scale, need_kvm, scaled};

const TRIES: usize = 5;

/// The least pause of the parent in some forks.
fn least_pause(vm: &Guest, freeze: FreezeKind, mode: MemoryMode) -> Duration {
    let before = vm.log.pauses().len();
    for _ in 0..TRIES {
        drop(vm.fork_point(fork_by(freeze, mode, 1)).unwrap());
    }
    let pauses = vm.log.pauses();
    assert_eq!(pauses.len(), before + TRIES);
    let least = pauses[before..].iter().min().copied().unwrap();
    println!("{freeze}: {least:?}, the least of {:?}", &pauses[before..]);
    least
}

#[test]
fn a_parent_pauses_less_than_half_as_long_for_write_protect_as_for_copy() {
    need_kvm!();
    let mib = scaled(256, 8);
    let vm = Setup::new(format!("job=reach mib={mib}"))
        .memory_mib(512)
        .no_copier()
        .boot();
    vm.wait_ready(LONG).unwrap();
    println!("{mib} MiB populated");
    let write_protect = least_pause(&vm, FreezeKind::WriteProtect, MemoryMode::Lazy);
    let copy = least_pause(&vm, FreezeKind::Copy, MemoryMode::Cow);
    // In a small and emulated machine a ratio of times means nothing.
    if full_scale() {
        assert!(write_protect * 2 < copy, "{write_protect:?}, {copy:?}");
    }
}
