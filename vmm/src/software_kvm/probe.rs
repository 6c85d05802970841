//! What this KVM promises of guest ring 0, asked of a guest.

use std::sync::Arc;

use crate::kvm::Kvm;
use crate::vcpu::{StateError, restore_msrs};
use crate::vm::probe_guest::{CODE, PORT, ProbeGuest, Ring, Said};
use crate::vm::{VmError, call};

const MSR_STAR: u32 = 0xc000_0081;
const MSR_LSTAR: u32 = 0xc000_0082;
const EFER_SCE: u64 = 1;

/// `popcnt eax, eax; out PORT, al`: an instruction that interpreters of ring 0 lack first.
const IN_RING_0: [u8; 6] = [0xf3, 0x0f, 0xb8, 0xc0, 0xe6, PORT];

/// `syscall`; at [`ENTRY`]: `mov eax, cs; out PORT, al`.
const ENTERS_RING_0: [u8; 12] = [
    0x0f, 0x05, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0x8c, 0xc8, 0xe6, PORT,
];
const ENTRY: u64 = CODE + 8;
/// Selectors for SYSCALL: code 0x10, stack 0x18.
const STAR: u64 = 0x10 << 32;

/// What the guest's ring 0 can rely on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Promises {
    /// It runs all instructions, not those of an interpreter.
    pub whole_ring_0: bool,
    /// SYSCALL enters it.
    pub syscall: bool,
}

impl Promises {
    /// As on hardware.
    pub fn all(self) -> bool {
        self.whole_ring_0 && self.syscall
    }

    pub(crate) fn ask(kvm: &Arc<Kvm>) -> Result<Promises, VmError> {
        let whole_ring_0 = {
            let guest = ProbeGuest::build(kvm, &IN_RING_0, Ring::Kernel)?;
            matches!(guest.run()?, Said::Word(_))
        };
        let syscall = {
            let guest = ProbeGuest::build(kvm, &ENTERS_RING_0, Ring::User)?;
            let mut sregs = *guest.sregs();
            sregs.efer |= EFER_SCE;
            let vcpu = guest.vcpu();
            vcpu.fd().set_sregs(&sregs).map_err(call("KVM_SET_SREGS"))?;
            let msrs = [(MSR_STAR, STAR), (MSR_LSTAR, ENTRY)];
            restore_msrs(vcpu.fd(), &msrs).map_err(StateError::from)?;
            drop(vcpu);
            // The selector that it sees says which ring it is in.
            matches!(guest.run()?, Said::Word(selector) if selector & 3 == 0)
        };
        Ok(Promises {
            whole_ring_0,
            syscall,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::{KVM_PATH, KvmFlavour};

    #[test]
    fn hardware_promises_all_and_kvm_pvm_neither() {
        if !std::path::Path::new(KVM_PATH).exists() {
            println!("skipped: this host has no {KVM_PATH}");
            return;
        }
        let kvm = Arc::new(Kvm::open().unwrap());
        let promises = Promises::ask(&kvm).unwrap();
        match kvm.flavour() {
            KvmFlavour::Pvm => assert!(!promises.whole_ring_0 && !promises.syscall),
            KvmFlavour::Vmx | KvmFlavour::Svm => assert!(promises.all()),
            KvmFlavour::Unknown => println!("{promises:?}"),
        }
    }
}
