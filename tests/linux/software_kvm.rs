//! What stands in for KVM where that is software, and is not there where it is not.

use std::sync::Arc;

use forkvm::vmm::{Kvm, KvmFlavour};

use super::common::need_kvm;
use super::machine::{Machine, sh};

#[test]
fn linux_is_helped_where_kvm_is_software_and_nowhere_else() {
    need_kvm!();
    let kvm = Arc::new(Kvm::open().unwrap());
    let machine = Machine::restore(1);
    sh(&machine, "true");
    let counts = machine.member().fallback_counts().unwrap();
    match kvm.flavour() {
        KvmFlavour::Pvm => assert!(counts.is_some_and(|counts| !counts.is_empty())),
        _ => assert_eq!(counts, None),
    }
}
