//! Whether a guest sees page tables that were changed in memory behind its back.
//!
//! With two-dimensional paging (EPT, NPT) the CPU walks the guest's own tables, and a flush of the TLB
//! is all that is needed. A shadow MMU (kvm-pvm; kvm_intel and kvm_amd without ept, npt) walks copies,
//! which it renews when the guest writes or flushes, but not when the host changed the tables: the guest
//! goes on with translations of a time that is gone. No capability tells the two apart, so a tiny guest
//! is asked. Called once per [`Kvm`]; whoever puts memory back under a vCPU that has run relies on it.

use std::sync::Arc;

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuExit;
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::objects::KvmObjects;
use super::{VmError, call};
use crate::cpuid;
use crate::kvm::Kvm;
use crate::machine::lock;
use crate::memory::{MIN_MIB, MemoryLayout, PAGE, Ram};
use crate::vcpu::{Vcpu, flush_tlb};

// Guest-physical pages of the guest.
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const DIRECTORY: u64 = 0x3000;
const TABLE: u64 = 0x4000;
/// Mapped where they are: the program, and a task state segment whose I/O bitmap allows all ports. Some
/// KVM goes by that and not by the I/O privilege level.
const CODE: u64 = 0x5000;
const TASK: u64 = 0x9000;
/// Where its I/O bitmap begins, which is told at offset 102 (Intel SDM volume 3, section 8.7).
const IO_BITMAP: u16 = 104;
/// Where [`DATA`] leads to at first, and where it leads to afterwards. Each holds its index.
const PAGES: [u64; 2] = [0x6000, 0x7000];
/// Virtual address that the guest reads.
const DATA: u64 = 0x8000;

/// `1: mov al, [DATA]; out PORT, al; jmp 1b`
const PROGRAM: [u8; 11] = [
    0x8a, 0x04, 0x25, 0x00, 0x80, 0x00, 0x00, 0xe6, PORT, 0xeb, 0xf5,
];
const PORT: u8 = 0x80;

/// Of an entry of any table: present, writable, user, accessed, dirty. No walk has to write.
const ENTRY: u64 = 0x67;

const CR0_PE: u64 = 1;
const CR0_NE: u64 = 1 << 5;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Flags with I/O privilege level 3: the guest may use its port.
const RFLAGS: u64 = 2 | 3 << 12;

/// Exits without a word of the guest, after which it is given up.
const MOST_EXITS: u32 = 1000;

/// Whether the guest reads what its page tables say once the host has changed them and flushed the TLB.
///
/// It runs at privilege level 3: there every KVM lets the CPU translate, also one that interprets what
/// runs at level 0.
pub(crate) fn sees_rewritten_tables(kvm: &Arc<Kvm>) -> Result<bool, VmError> {
    let ram = Ram::new(MemoryLayout::new(MIN_MIB)?)?;
    let data_entry = TABLE + DATA / PAGE * 8;
    write(&ram, PML4, PDPT | ENTRY)?;
    write(&ram, PDPT, DIRECTORY | ENTRY)?;
    write(&ram, DIRECTORY, TABLE | ENTRY)?;
    for page in [CODE, TASK] {
        write(&ram, TABLE + page / PAGE * 8, page | ENTRY)?;
    }
    write(&ram, TASK + 102, IO_BITMAP)?;
    write(&ram, data_entry, PAGES[0] | ENTRY)?;
    write(&ram, CODE, PROGRAM)?;
    for (page, index) in PAGES.into_iter().zip(0u8..) {
        write(&ram, page, index)?;
    }
    let objects = KvmObjects::build(kvm, 1, ram)?;
    let mut vcpu = lock(&objects.vcpus[0]);
    let sregs = enter(&mut vcpu, kvm)?;
    let before = next_word(&mut vcpu)?;
    write(&objects.ram, data_entry, PAGES[1] | ENTRY)?;
    flush_tlb(vcpu.fd(), &sregs)?;
    let after = next_word(&mut vcpu)?;
    match (before, after) {
        (0, 1) => Ok(true),
        (0, 0) => Ok(false),
        (before, after) => {
            let what = format!("the guest read {before} and then {after}, which is nowhere");
            Err(VmError::Probe { what })
        }
    }
}

fn write(ram: &Ram, at: u64, value: impl ByteValued) -> Result<(), VmError> {
    let written = ram.guest().write_obj(value, GuestAddress(at));
    written.map_err(|error| {
        let what = format!("writing its memory at {at:#x}: {error}");
        VmError::Probe { what }
    })
}

/// Puts the vCPU at the program, in long mode at privilege level 3, and says what SREGS it has then.
fn enter(vcpu: &mut Vcpu, kvm: &Kvm) -> Result<kvm_sregs, VmError> {
    let cpuid = cpuid::for_vcpu(kvm.supported_cpuid(), 0, 1, kvm.tsc_deadline());
    vcpu.set_cpuid(&cpuid)?;
    let fd = vcpu.fd();
    let mut sregs = fd.get_sregs().map_err(call("KVM_GET_SREGS"))?;
    let flat = |selector, type_| kvm_segment {
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 3,
        s: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment {
        l: 1,
        ..flat(0x13, 0xb)
    };
    let data = kvm_segment {
        db: 1,
        ..flat(0x1b, 0x3)
    };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment {
        base: TASK,
        limit: PAGE as u32 - 1,
        selector: 0x20,
        type_: 0xb,
        present: 1,
        ..Default::default()
    };
    sregs.cr3 = PML4;
    sregs.cr4 |= CR4_PAE;
    sregs.cr0 = CR0_PE | CR0_NE | CR0_PG;
    sregs.efer |= EFER_LME | EFER_LMA;
    fd.set_sregs(&sregs).map_err(call("KVM_SET_SREGS"))?;
    let regs = kvm_regs {
        rip: CODE,
        rflags: RFLAGS,
        ..Default::default()
    };
    fd.set_regs(&regs).map_err(call("KVM_SET_REGS"))?;
    Ok(sregs)
}

/// Runs the guest until it says what it read.
fn next_word(vcpu: &mut Vcpu) -> Result<u8, VmError> {
    for _ in 0..MOST_EXITS {
        match vcpu.fd_mut().run() {
            Ok(VcpuExit::IoOut(port, &[word])) if port == u16::from(PORT) => return Ok(word),
            Ok(VcpuExit::Intr) => {}
            Err(error) if error.errno() == libc::EINTR => {}
            Ok(exit) => {
                let what = format!("the guest ended in {exit:?}");
                return Err(VmError::Probe { what });
            }
            Err(error) => return Err(call("KVM_RUN")(error)),
        }
    }
    let what = format!("the guest says nothing in {MOST_EXITS} runs");
    Err(VmError::Probe { what })
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
