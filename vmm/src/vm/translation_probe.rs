//! Whether a guest sees page tables that were changed in memory behind its back.
//!
//! With two-dimensional paging (EPT, NPT) the CPU walks the guest's own tables, and a flush of the TLB
//! is all that is needed. A shadow MMU (kvm-pvm; kvm_intel and kvm_amd without ept, npt) walks copies,
//! which it renews when the guest writes or flushes, but not when the host changed the tables: the guest
//! goes on with translations of a time that is gone. No capability tells the two apart, so a tiny guest
//! is asked. Called once per [`Kvm`]; whoever puts memory back under a vCPU that has run relies on it.

use std::sync::Arc;

use super::VmError;
use super::probe_guest::{FREE, PORT, ProbeGuest, Ring};
use crate::kvm::Kvm;
use crate::vcpu::flush_tlb;

/// Where [`DATA`] leads to at first, and where it leads to afterwards. Each holds its index.
const PAGES: [u64; 2] = [FREE, FREE + 0x1000];
/// Virtual address that the guest reads.
const DATA: u64 = 0x8000;

/// `1: mov al, [DATA]; out PORT, al; jmp 1b`
const PROGRAM: [u8; 11] = [
    0x8a, 0x04, 0x25, 0x00, 0x80, 0x00, 0x00, 0xe6, PORT, 0xeb, 0xf5,
];

/// Whether the guest reads what its page tables say once the host has changed them and flushed the TLB.
///
/// It runs at privilege level 3: there every KVM lets the CPU translate, also one that interprets what
/// runs at level 0.
pub(crate) fn sees_rewritten_tables(kvm: &Arc<Kvm>) -> Result<bool, VmError> {
    let guest = ProbeGuest::build(kvm, &PROGRAM, Ring::User)?;
    for (page, index) in PAGES.into_iter().zip(0u8..) {
        guest.write(page, index)?;
    }
    guest.map(DATA, PAGES[0])?;
    let before = guest.next_word()?;
    guest.map(DATA, PAGES[1])?;
    flush_tlb(guest.vcpu().fd(), guest.sregs())?;
    let after = guest.next_word()?;
    match (before, after) {
        (0, 1) => Ok(true),
        (0, 0) => Ok(false),
        (before, after) => {
            let what = format!("the guest read {before} and then {after}, which is nowhere");
            Err(VmError::Probe { what })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::KvmFlavour;

    /// What is known of a host from elsewhere: kvm-pvm shadows always, kvm_amd unless it says npt.
    fn expected(flavour: KvmFlavour) -> Option<bool> {
        let parameter = |path| {
            std::fs::read_to_string(path).map(|text| text.trim() == "Y" || text.trim() == "1")
        };
        match flavour {
            KvmFlavour::Pvm => Some(false),
            KvmFlavour::Svm => parameter("/sys/module/kvm_amd/parameters/npt").ok(),
            KvmFlavour::Vmx => parameter("/sys/module/kvm_intel/parameters/ept").ok(),
            KvmFlavour::Unknown => None,
        }
    }

    #[test]
    fn a_guest_on_a_shadow_mmu_is_told_from_one_whose_tables_the_cpu_walks() {
        if !std::path::Path::new(crate::kvm::KVM_PATH).exists() {
            println!("skipped: this host has no /dev/kvm");
            return;
        }
        let kvm = Arc::new(Kvm::open().unwrap());
        for _ in 0..10 {
            let found = sees_rewritten_tables(&kvm).unwrap();
            if let Some(expected) = expected(kvm.flavour()) {
                assert_eq!(found, expected, "on {}", kvm.flavour());
            }
        }
    }
}
