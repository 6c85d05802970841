//! Rewinds of live clones on KVM: what a clone finds at its fork point, again and again.

#[path = "../common/mod.rs"]
mod common;

mod breaks;
mod calls;
mod held;
mod lineage;
mod memory;
mod refusals;
mod state;
mod window;

use std::sync::Arc;

use forkvm::RewindWay;
use forkvm::vmm::Kvm;

/// Whether the KVM of this host goes by the guest's own page tables.
fn two_dimensional() -> bool {
    let kvm = Arc::new(Kvm::open().unwrap());
    kvm.sees_rewritten_tables().unwrap()
}

/// The ways that this host allows.
fn ways() -> Vec<RewindWay> {
    let mut ways = vec![RewindWay::SlotReadd, RewindWay::FreshShell];
    if two_dimensional() {
        ways.push(RewindWay::InPlace);
    }
    ways
}
