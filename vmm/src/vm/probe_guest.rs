//! A guest of a few instructions, to ask a KVM what it does.
//!
//! One vCPU in long mode, its first pages mapped where they are, one program, one port to speak through.
//! Used once per [`Kvm`] by each probe; knows nothing of what is asked.

use std::sync::{Arc, MutexGuard};

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuExit;
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::objects::KvmObjects;
use super::{VmError, call};
use crate::cpuid;
use crate::kvm::Kvm;
use crate::machine::lock;
use crate::memory::{MIN_MIB, MemoryLayout, PAGE, Ram};
use crate::vcpu::Vcpu;

// Guest-physical pages of the guest.
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const DIRECTORY: u64 = 0x3000;
const TABLE: u64 = 0x4000;
/// Mapped where they are: the program, and a task state segment whose I/O bitmap allows all ports. Some
/// KVM goes by that and not by the I/O privilege level.
pub(crate) const CODE: u64 = 0x5000;
const TASK: u64 = 0x9000;
/// Where its I/O bitmap begins, which is told at offset 102 (Intel SDM volume 3, section 8.7).
const IO_BITMAP: u16 = 104;
/// Two pages that a probe may use as it likes, mapped nowhere.
pub(crate) const FREE: u64 = 0x6000;

/// What the guest says, it writes there, one byte at a time.
pub(crate) const PORT: u8 = 0x80;

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

/// Where the program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ring {
    /// Privilege level 0.
    Kernel,
    /// Privilege level 3.
    User,
}

/// See the module's text.
pub(crate) struct ProbeGuest {
    objects: KvmObjects,
    sregs: kvm_sregs,
}

impl ProbeGuest {
    /// A guest whose vCPU is at the start of `program`.
    pub(crate) fn build(kvm: &Arc<Kvm>, program: &[u8], ring: Ring) -> Result<ProbeGuest, VmError> {
        let ram = Ram::new(MemoryLayout::new(MIN_MIB)?)?;
        let objects = KvmObjects::build(kvm, 1, ram)?;
        let sregs = enter(&mut lock(&objects.vcpus[0]), kvm, ring)?;
        let guest = ProbeGuest { objects, sregs };
        guest.write(PML4, PDPT | ENTRY)?;
        guest.write(PDPT, DIRECTORY | ENTRY)?;
        guest.write(DIRECTORY, TABLE | ENTRY)?;
        for page in [CODE, TASK] {
            guest.map(page, page)?;
        }
        guest.write(TASK + 102, IO_BITMAP)?;
        for (byte, at) in program.iter().zip(CODE..) {
            guest.write(at, *byte)?;
        }
        Ok(guest)
    }

    /// Has the virtual page at `address`, below 2 MiB, lead to `page`.
    pub(crate) fn map(&self, address: u64, page: u64) -> Result<(), VmError> {
        self.write(TABLE + address / PAGE * 8, page | ENTRY)
    }

    /// Writes to guest-physical memory.
    pub(crate) fn write(&self, at: u64, value: impl ByteValued) -> Result<(), VmError> {
        let guest = self.objects.ram.guest();
        guest.write_obj(value, GuestAddress(at)).map_err(|error| {
            let what = format!("writing its memory at {at:#x}: {error}");
            VmError::Probe { what }
        })
    }

    pub(crate) fn vcpu(&self) -> MutexGuard<'_, Vcpu> {
        lock(&self.objects.vcpus[0])
    }

    /// Those that the vCPU was started with.
    pub(crate) fn sregs(&self) -> &kvm_sregs {
        &self.sregs
    }

    /// Makes up for what this KVM lacks, as a machine does that boots a kernel.
    #[cfg(test)]
    pub(crate) fn use_software_kvm(&mut self) -> Result<(), VmError> {
        self.objects
            .use_software_kvm(std::iter::repeat_with(crate::software_kvm::Relay::default))
    }

    #[cfg(test)]
    pub(crate) fn fallback_counts(&self) -> Option<crate::software_kvm::FallbackCounts> {
        Some(lock(self.objects.fallbacks.as_ref()?).clone())
    }

    /// A word of guest-physical memory.
    #[cfg(test)]
    pub(crate) fn read(&self, at: u64) -> u64 {
        self.objects.ram.guest().read_obj(GuestAddress(at)).unwrap()
    }

    /// Runs the guest until it says something; any other end of it is an error.
    pub(crate) fn next_word(&self) -> Result<u8, VmError> {
        match self.run()? {
            Said::Word(word) => Ok(word),
            Said::Nothing { exit } => {
                let what = format!("the guest ended in {exit}");
                Err(VmError::Probe { what })
            }
        }
    }

    /// Runs the guest until it says something or cannot go on.
    pub(crate) fn run(&self) -> Result<Said, VmError> {
        let mut vcpu = self.vcpu();
        for _ in 0..MOST_EXITS {
            match vcpu.fd_mut().run() {
                Ok(VcpuExit::IoOut(port, &[word])) if port == u16::from(PORT) => {
                    return Ok(Said::Word(word));
                }
                Ok(VcpuExit::Intr) => {}
                Err(error) if error.errno() == libc::EINTR => {}
                Ok(exit) => {
                    let exit = format!("{exit:?}");
                    return Ok(Said::Nothing { exit });
                }
                Err(error) => return Err(call("KVM_RUN")(error)),
            }
        }
        let what = format!("the guest says nothing in {MOST_EXITS} runs");
        Err(VmError::Probe { what })
    }
}

/// What became of a run of the guest.
pub(crate) enum Said {
    /// It wrote this to its port.
    Word(u8),
    /// KVM_RUN ended otherwise.
    Nothing {
        /// How.
        exit: String,
    },
}

/// Puts the vCPU at the program, in long mode, and says what SREGS it has then.
fn enter(vcpu: &mut Vcpu, kvm: &Kvm, ring: Ring) -> Result<kvm_sregs, VmError> {
    let cpuid = cpuid::for_vcpu(kvm.supported_cpuid(), 0, 1, kvm.tsc_deadline());
    vcpu.set_cpuid(&cpuid)?;
    let fd = vcpu.fd();
    let mut sregs = fd.get_sregs().map_err(call("KVM_GET_SREGS"))?;
    let level = match ring {
        Ring::Kernel => 0,
        Ring::User => 3,
    };
    let flat = |selector: u16, type_| kvm_segment {
        limit: 0xffff_ffff,
        selector: selector | u16::from(level),
        type_,
        present: 1,
        dpl: level,
        s: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment {
        l: 1,
        ..flat(0x10, 0xb)
    };
    let data = kvm_segment {
        db: 1,
        ..flat(0x18, 0x3)
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
