//! SYSCALL, finished by hand.
//!
//! kvm-pvm's SYSCALL loads RCX, R11, RFLAGS and RIP as it should and leaves the CPU in ring 3, where the
//! kernel's entry may not be fetched. So writes to IA32_LSTAR are kept from KVM: it gets the address of
//! a stub instead. The stub is a page of guest memory that the guest's own page tables map for ring 3 in
//! the slot of the legacy vsyscall page, which kernels since 3.1 leave empty or can be told to
//! (`vsyscall=none`). It stores to the page behind it, which is mapped to an address without memory:
//! KVM_RUN comes back with an MMIO exit, and the vCPU is put into ring 0 at the guest's own entry.

use forkvm_devices::GuestMemory;
use kvm_bindings::{kvm_segment, kvm_sregs};
use kvm_ioctls::{MsrFilterRange, MsrFilterRangeFlags, VcpuFd};
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};

use super::SoftwareKvmError;
use super::fault::Fault;
use super::page_walk::{
    ACCESSED, ADDRESS, CR4_LA57, DIRTY, LARGE, PRESENT, USER, WRITABLE, exchange,
};
use crate::memory::PAGE;
use crate::vcpu::{StateError, reading, restore_msrs, writing};

/// Guest-physical address of the stub; page tables that the guest lacks on the way to it follow.
pub(super) const STUB: u64 = 0x9_b000;
/// Pages there: the stub, and a table of each lower level.
pub(super) const PAGES: u64 = 4;
/// Guest-physical page without memory that the stub stores to: no device of the machine is there.
pub(super) const DOOR: u64 = 0xdf00_0000;

/// Where the guest's page tables map the stub: the vsyscall page.
const STUB_VIRTUAL: u64 = 0xffff_ffff_ff60_0000;
/// Into the page; what is before it stays a trap (`int3`).
const ENTRY: u64 = 0x10;
/// `mov [STUB_VIRTUAL + PAGE], eax`
const CODE: [u8; 7] = [0x89, 0x04, 0x25, 0x00, 0x10, 0x60, 0xff];
const INT3: u8 = 0xcc;

pub(super) const MSR_STAR: u32 = 0xc000_0081;
pub(super) const MSR_LSTAR: u32 = 0xc000_0082;
pub(super) const MSR_CSTAR: u32 = 0xc000_0083;
pub(super) const MSR_FMASK: u32 = 0xc000_0084;

const RFLAGS_RF: u64 = 1 << 16;
/// Flags that a program in ring 3 can have: arithmetic, TF, IF, DF, NT, AC, ID.
const RFLAGS_OF_PROGRAMS: u64 = 0x24_4fd7;
/// Addresses of programs.
const USER_HALF: u64 = (1 << 47) - 1;

/// What the guest wrote to the MSRs of SYSCALL.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Relay {
    star: u64,
    /// `None` until it is written: then KVM has the stub's address.
    lstar: Option<u64>,
    cstar: u64,
    fmask: u64,
}

/// The MSRs that the guest may neither read nor write by itself.
pub(super) const FILTERED: MsrFilterRange<'_> = MsrFilterRange {
    flags: MsrFilterRangeFlags::READ.union(MsrFilterRangeFlags::WRITE),
    base: MSR_STAR,
    msr_count: 4,
    // A zero bit denies; as many bytes as the kernel reads.
    bitmap: &[0; 8],
};

impl Relay {
    pub(super) fn msr_read(&self, msr: u32) -> Option<u64> {
        match msr {
            MSR_STAR => Some(self.star),
            MSR_LSTAR => Some(self.lstar.unwrap_or(0)),
            MSR_CSTAR => Some(self.cstar),
            MSR_FMASK => Some(self.fmask),
            _ => None,
        }
    }

    pub(super) fn msr_written(
        &mut self,
        vcpu: &VcpuFd,
        memory: &GuestMemory,
        msr: u32,
        value: u64,
    ) -> Result<(), SoftwareKvmError> {
        let mut for_kvm = value;
        match msr {
            MSR_STAR => self.star = value,
            MSR_CSTAR => self.cstar = value,
            MSR_FMASK => self.fmask = value,
            _ => {
                let sregs = vcpu.get_sregs().map_err(reading("SREGS"))?;
                install(memory, &sregs)?;
                self.lstar = Some(value);
                for_kvm = STUB_VIRTUAL + ENTRY;
            }
        }
        Ok(restore_msrs(vcpu, &[(msr, for_kvm)]).map_err(StateError::from)?)
    }

    /// What is left to do of a SYSCALL that has come to the stub (Intel SDM volume 2, SYSCALL).
    ///
    /// A program can jump to the stub, too, with flags and registers of its choice: ring 0 gets none that
    /// a real SYSCALL could not have given it. One that stores to the door by itself gets #GP.
    pub(super) fn enter(&self, vcpu: &VcpuFd) -> Result<(), SoftwareKvmError> {
        let mut sregs = vcpu.get_sregs().map_err(reading("SREGS"))?;
        let mut regs = vcpu.get_regs().map_err(reading("REGS"))?;
        let from_stub = regs.rip == STUB_VIRTUAL + ENTRY + CODE.len() as u64;
        let (Some(lstar), true, 3) = (self.lstar, from_stub, sregs.ss.dpl) else {
            Fault::Protection.raise(vcpu)?;
            return Ok(());
        };
        let selector = (self.star >> 32 & 0xfffc) as u16;
        let flat = |selector, type_| kvm_segment {
            limit: 0xffff_ffff,
            selector,
            type_,
            present: 1,
            s: 1,
            g: 1,
            ..Default::default()
        };
        sregs.cs = kvm_segment {
            l: 1,
            ..flat(selector, 0xb)
        };
        sregs.ss = kvm_segment {
            db: 1,
            ..flat(selector + 8, 0x3)
        };
        // What is being delivered stays in the events; here it would be delivered twice.
        sregs.interrupt_bitmap = [0; 4];
        regs.rip = lstar;
        regs.rflags &= !(RFLAGS_RF | self.fmask);
        regs.r11 &= RFLAGS_OF_PROGRAMS;
        // Not canonical, SYSRET would fault in ring 0.
        regs.rcx &= USER_HALF;
        vcpu.set_sregs(&sregs).map_err(writing("SREGS"))?;
        vcpu.set_regs(&regs).map_err(writing("REGS"))?;
        Ok(())
    }
}

/// Writes the stub, and maps it and the page behind it in the tables at `cr3`; what is there already
/// stays. KVM's shadow of the tables needs no word of it: it holds no absent entries.
fn install(memory: &GuestMemory, sregs: &kvm_sregs) -> Result<(), SoftwareKvmError> {
    if sregs.cr4 & CR4_LA57 != 0 {
        return Err(SoftwareKvmError::FiveLevels);
    }
    let outside = |_outside| SoftwareKvmError::NoTables;
    let mut page = [INT3; PAGE as usize];
    page[ENTRY as usize..][..CODE.len()].copy_from_slice(&CODE);
    memory
        .write_slice(&page, GuestAddress(STUB))
        .map_err(outside)?;
    let mut table = sregs.cr3 & ADDRESS;
    for level in (1..4).rev() {
        let at = GuestAddress(table + (STUB_VIRTUAL >> (12 + 9 * level) & 0x1ff) * 8);
        let entry: u64 = memory.read_obj(at).map_err(outside)?;
        let wanted = if entry & PRESENT == 0 {
            let spare = STUB + level * PAGE;
            memory
                .write_slice(&[0; PAGE as usize], GuestAddress(spare))
                .map_err(outside)?;
            spare | PRESENT | WRITABLE | USER
        } else if level < 3 && entry & LARGE != 0 {
            return Err(SoftwareKvmError::VsyscallTaken);
        } else {
            entry | WRITABLE | USER
        };
        if wanted != entry {
            // Nobody else maps kernel memory there while a CPU turns SYSCALL on.
            exchange(memory, at, entry, wanted).ok_or(SoftwareKvmError::NoTables)?;
        }
        table = wanted & ADDRESS;
    }
    let leaves = [
        STUB | PRESENT | USER | ACCESSED,
        DOOR | PRESENT | WRITABLE | USER | ACCESSED | DIRTY,
    ];
    let first = table + (STUB_VIRTUAL >> 12 & 0x1ff) * 8;
    for (leaf, at) in leaves.into_iter().zip((first..).step_by(8)) {
        let entry: u64 = memory.read_obj(GuestAddress(at)).map_err(outside)?;
        if entry & PRESENT != 0 && entry & ADDRESS != leaf & ADDRESS {
            return Err(SoftwareKvmError::VsyscallTaken);
        }
        memory.write_obj(leaf, GuestAddress(at)).map_err(outside)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::page_walk::{Access, translate};
    use super::*;

    const ROOT: u64 = 0x1000;

    fn memory() -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap()
    }

    fn sregs() -> kvm_sregs {
        kvm_sregs {
            cr3: ROOT,
            ..Default::default()
        }
    }

    fn walk(memory: &GuestMemory, address: u64, access: Access) -> Result<GuestAddress, Fault> {
        translate(memory, &sregs(), address, access, true)
    }

    #[test]
    fn ring_3_finds_the_stub_and_the_door_after_it_was_installed_any_number_of_times() {
        let memory = memory();
        for _ in 0..2 {
            install(&memory, &sregs()).unwrap();
            let stub = walk(&memory, STUB_VIRTUAL + ENTRY, Access::Fetch).unwrap();
            assert_eq!(stub, GuestAddress(STUB + ENTRY));
            let door = walk(&memory, STUB_VIRTUAL + PAGE, Access::Write).unwrap();
            assert_eq!(door, GuestAddress(DOOR));
        }
        assert!(walk(&memory, STUB_VIRTUAL, Access::Write).is_err());
    }

    #[test]
    fn a_guest_that_uses_the_vsyscall_page_is_told_how_to_be_booted() {
        let memory = memory();
        install(&memory, &sregs()).unwrap();
        let table = STUB + PAGE;
        let at = GuestAddress(table + (STUB_VIRTUAL >> 12 & 0x1ff) * 8);
        memory.write_obj(0x7000 | PRESENT, at).unwrap();
        let refused = install(&memory, &sregs()).unwrap_err();
        assert!(refused.to_string().contains("vsyscall=none"), "{refused}");
    }
}
