//! What a KVM that is software leaves to its user where guest ring 0 is an operating system's.
//!
//! On hardware a guest's kernel runs as its programs do. kvm-pvm interprets ring 0 and runs ring 3 on
//! the CPU, and two things are missing there. Instructions that its interpreter lacks end KVM_RUN with
//! an internal error; the [`fallback`] carries those out that kernels need. And SYSCALL enters the
//! guest's kernel at its address but not in ring 0; the [`relay`] finishes the step. Which of the two a
//! KVM lacks is asked of a guest once ([`Promises`]), and where it lacks none, nothing of this is there.
//! And as an interpreted tick is dear, timer interrupts come at a [pace](timer_pace) of their own.
//!
//! A vCPU ([`Vcpu`](crate::vcpu::Vcpu)) calls [`SoftwareKvm`] at the exits that this module asked for, and knows nothing else of it:
//! an interpreter of ring 0 in user space could stand in its place. State: section `kvm/software`, and
//! the pages of the stub, which are guest memory ([`RESERVED`]).

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use forkvm_devices::{GuestMemory, SavedState};
use kvm_bindings::{KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_FILTER, kvm_enable_cap};
use kvm_ioctls::{MsrFilterDefaultAction, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::machine::lock;
use crate::memory::PAGE;
use crate::vcpu::{StateError, msrs};
use crate::vm::{VmError, call};

mod cpu;
mod fallback;
mod fault;
mod page_walk;
mod probe;
mod relay;
#[cfg(test)]
mod tests;
mod timer_pace;
mod xsave;

use cpu::Cpu;
pub(crate) use fallback::Outcome;
pub use probe::Promises;
pub(crate) use relay::Relay;
use timer_pace::TimerPace;

/// Guest-physical pages that the guest must leave alone: the memory map calls them reserved.
pub(crate) const RESERVED: Range<u64> = relay::STUB..relay::STUB + relay::PAGES * PAGE;

/// What a Linux kernel must be told: CPUID shows it features that ring 0 does not have here, which are
/// `rep` instructions that are fast on a CPU (each step of one is interpreted), and protection of user
/// memory. That its page tables must have four levels, be the same for ring 3, and leave the vsyscall
/// page free. And what to leave undone at boot, which is a fifth of its instructions: it takes each `lock`
/// prefix out of itself where there is one CPU, and splits its own mapping to have parts of it read-only. Names of
/// features are understood since Linux 5.19.
pub(crate) const KERNEL_OPTIONS: &str =
    " clearcpuid=erms,fsrm,smap,cx16 pti=off no5lvl vsyscall=none noreplace-smp rodata=off";

/// How often each instruction was carried out for KVM, by its mnemonic in lower case.
pub type FallbackCounts = BTreeMap<String, u64>;

/// Section `kvm/software`. Only there in machines that need it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SoftwareState {
    /// One of each vCPU.
    pub(crate) vcpus: Vec<Relay>,
}

impl SavedState for SoftwareState {
    const VERSION: u16 = 1;
}

/// What stands in for the lacking parts of KVM, for one vCPU.
pub(crate) struct SoftwareKvm {
    memory: GuestMemory,
    xsave_size: usize,
    relay: Relay,
    timer: TimerPace,
    counts: Arc<Mutex<FallbackCounts>>,
}

impl SoftwareKvm {
    /// Has KVM leave accesses to some MSRs to user space (KVM API 4.97 and 7.21). Before the vCPUs run.
    pub(crate) fn prepare(vm: &VmFd) -> Result<(), VmError> {
        let mut cap = kvm_enable_cap {
            cap: KVM_CAP_X86_USER_SPACE_MSR,
            ..Default::default()
        };
        cap.args[0] = u64::from(KVM_MSR_EXIT_REASON_FILTER);
        vm.enable_cap(&cap)
            .map_err(call("KVM_ENABLE_CAP(KVM_CAP_X86_USER_SPACE_MSR)"))?;
        let filtered = [relay::FILTERED, timer_pace::FILTERED];
        vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &filtered)
            .map_err(call("KVM_X86_SET_MSR_FILTER"))
    }

    /// For a vCPU whose machine has this memory, and that has stood so. `xsave_size` as KVM_CAP_XSAVE2
    /// says.
    pub(crate) fn new(
        memory: GuestMemory,
        xsave_size: usize,
        relay: Relay,
        counts: Arc<Mutex<FallbackCounts>>,
    ) -> SoftwareKvm {
        SoftwareKvm {
            memory,
            xsave_size,
            relay,
            timer: TimerPace::default(),
            counts,
        }
    }

    /// How the vCPU stands, for its machine's state.
    pub(crate) fn relay(&self) -> &Relay {
        &self.relay
    }

    /// Whether a write to this address is a SYSCALL that has come to the stub.
    pub(crate) fn is_syscall(address: u64) -> bool {
        address & !0xfff == relay::DOOR
    }

    /// Finishes the SYSCALL: the vCPU is in ring 0 at the guest's own entry afterwards.
    pub(crate) fn syscall(&self, fd: &VcpuFd) -> Result<(), SoftwareKvmError> {
        self.relay.enter(fd)
    }

    /// The guest wrote one of the MSRs that [`SoftwareKvm::prepare`] asked for.
    pub(crate) fn msr_written(
        &mut self,
        fd: &VcpuFd,
        msr: u32,
        value: u64,
    ) -> Result<(), SoftwareKvmError> {
        match msr {
            msrs::TSC_DEADLINE => self.timer.deadline_written(fd, value),
            _ => self.relay.msr_written(fd, &self.memory, msr, value),
        }
    }

    /// What the guest is to read from one of them.
    pub(crate) fn msr_read(&self, msr: u32) -> Option<u64> {
        self.relay.msr_read(msr)
    }

    /// Carries out the instruction at RIP, which KVM has refused.
    pub(crate) fn instruction(&self, fd: &VcpuFd) -> Result<Outcome, SoftwareKvmError> {
        let mut cpu = Cpu::read(fd, &self.memory, self.xsave_size)?;
        let outcome = fallback::instruction(&mut cpu)?;
        if let Outcome::Done { mnemonic } = &outcome {
            *lock(&self.counts).entry(mnemonic.clone()).or_default() += 1;
        }
        Ok(outcome)
    }
}

/// Why this module could not stand in for KVM.
#[derive(Debug, Error)]
pub enum SoftwareKvmError {
    /// The vCPU's registers.
    #[error(transparent)]
    State(#[from] StateError),
    /// The guest has something where the stub must go.
    #[error(
        "the guest uses the vsyscall page, where SYSCALL is finished on this software KVM: boot its \
         kernel with `vsyscall=none`"
    )]
    VsyscallTaken,
    /// The guest turned SYSCALL on in an address space that this module cannot read.
    #[error("the guest wrote IA32_LSTAR while its page tables were not in RAM")]
    NoTables,
    /// Page tables of five levels.
    #[error("the guest has page tables of five levels: boot its kernel with `no5lvl`")]
    FiveLevels,
}
