//! What a vCPU thread does between two visits to the gate: run guest code and serve its exits.
#![allow(unsafe_code)] // A pointer to kvm_run's immediate_exit, for the kick.

use std::io;
use std::sync::{Arc, Mutex};

use forkvm_devices::{Effect, GuestMemory};
use kvm_bindings::{
    KVM_INTERNAL_ERROR_EMULATION, KVM_MP_STATE_RUNNABLE, KVM_SYSTEM_EVENT_RESET,
    KVM_SYSTEM_EVENT_SHUTDOWN, kvm_mp_state,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use thiserror::Error;

use super::MsrCatalogue;
use super::kick::Kickable;
use super::state::{Abilities, Clock, StateError, VcpuState, disarm, flush_tlb, writing};
use crate::kvm::Kvm;
use crate::machine::Buses;
use crate::software_kvm::{FallbackCounts, Outcome, Relay, SoftwareKvm, SoftwareKvmError};

/// One vCPU.
pub(crate) struct Vcpu {
    fd: VcpuFd,
    index: u32,
    kvm: Arc<Kvm>,
    abilities: Abilities,
    /// What it has been given ahead of its state.
    has: Option<VcpuState>,
    /// Stands in for what this KVM lacks, where the machine needs that.
    software: Option<SoftwareKvm>,
}

/// Why [`Vcpu::run`] came back.
#[derive(Debug)]
pub(crate) enum Stop {
    /// It was kicked.
    Kicked,
    /// An access means something to others: a call, a report, the end.
    Effect(Effect),
    /// The guest ended itself in a way of the hardware.
    TripleFault,
    /// The guest asked for a reset or a power-off through KVM.
    SystemEvent {
        /// A reset rather than a power-off.
        reset: bool,
    },
}

/// An exit that only a [`SoftwareKvm`] can serve.
enum ForSoftware {
    Syscall,
    MsrWrite {
        msr: u32,
        value: u64,
    },
    /// KVM gave up.
    Refused,
}

impl Vcpu {
    pub(crate) fn new(fd: VcpuFd, index: u32, kvm: Arc<Kvm>, abilities: Abilities) -> Vcpu {
        Vcpu {
            fd,
            index,
            kvm,
            abilities,
            has: None,
            software: None,
        }
    }

    pub(crate) fn index(&self) -> u32 {
        self.index
    }

    pub(crate) fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// The same, to run it without devices.
    pub(crate) fn fd_mut(&mut self) -> &mut VcpuFd {
        &mut self.fd
    }

    /// Lets kicks of the calling thread reach this vCPU as long as the value lives.
    pub(crate) fn kickable(&mut self) -> Kickable {
        let flag = &raw mut self.fd.get_kvm_run().immediate_exit;
        // SAFETY: the kvm_run mapping lives as long as the descriptor; the thread drops the value
        // before it gives up its share of the vCPU.
        unsafe { Kickable::new(flag) }
    }

    /// Has the vCPU's machine do with less than a hardware KVM; `relay` is how that stood.
    pub(crate) fn use_software_kvm(
        &mut self,
        memory: GuestMemory,
        relay: Relay,
        counts: Arc<Mutex<FallbackCounts>>,
    ) {
        let size = self.abilities.xsave_size;
        self.software = Some(SoftwareKvm::new(memory, size, relay, counts));
    }

    /// How that stands, if it is so.
    pub(crate) fn relay(&self) -> Option<Relay> {
        Some(self.software.as_ref()?.relay().clone())
    }

    /// Gives the vCPU the CPUID of `state`: once, before it runs.
    pub(crate) fn set_cpuid_of(&mut self, state: &VcpuState) -> Result<(), StateError> {
        state.set_cpuid(&self.fd)
    }

    /// Gives the vCPU its CPUID.
    pub(crate) fn set_cpuid(&mut self, cpuid: &kvm_bindings::CpuId) -> Result<(), StateError> {
        self.fd.set_cpuid2(cpuid).map_err(writing("CPUID2"))?;
        Ok(())
    }

    /// Learns which MSRs a vCPU has, unless another one of the process has done so. Once its CPUID
    /// is set; not left to the first save, which happens in a parent's pause.
    pub(crate) fn learn_msrs(&self) -> Result<(), StateError> {
        self.catalogue().map(|_known| ())
    }

    fn catalogue(&self) -> Result<&MsrCatalogue, StateError> {
        if let Some(known) = self.kvm.msrs().get() {
            return Ok(known);
        }
        let probed =
            MsrCatalogue::probe(self.kvm.fd(), &self.fd).map_err(|source| StateError::Read {
                class: "MSR list",
                source,
            })?;
        Ok(self.kvm.msrs().get_or_init(|| probed))
    }

    /// Reads its state; [`Vcpu::finish`] must have been called since it last ran.
    pub(crate) fn save(&self) -> Result<VcpuState, StateError> {
        VcpuState::save(&self.fd, self.abilities, self.catalogue()?)
    }

    /// Does what can be done ahead of a restore of `state`, or of one like it, whose CPUID it has.
    pub(crate) fn prime(&mut self, state: &VcpuState) -> Result<(), StateError> {
        let has = state.prime(&self.fd, self.abilities, self.catalogue()?)?;
        self.has = Some(has);
        Ok(())
    }

    /// Enters guest mode once, so that KVM makes now what it makes for a first entry: its caches for
    /// page tables, the roots of these, the thread's place. There must be no memory: whatever the
    /// registers say, no instruction is completed, and KVM_RUN comes back at once.
    pub(crate) fn warm_up(&mut self) -> Result<(), RunError> {
        let vcpu = self.index;
        let failed = |source: kvm_ioctls::Error| RunError::Call {
            vcpu,
            source: source.into(),
        };
        // Else it may wait for an interrupt or for its SIPI.
        let runnable = kvm_mp_state {
            mp_state: KVM_MP_STATE_RUNNABLE,
        };
        self.fd.set_mp_state(runnable).map_err(failed)?;
        let _kickable = self.kickable();
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            // A kick: it took too long, or comes too early to mean anything. The vCPU is colder, not wrong.
            Err(error) if error.errno() == libc::EINTR => {
                self.fd.set_kvm_immediate_exit(0);
                return Ok(());
            }
            // Two-dimensional paging: the first fetch finds no host memory.
            Err(error) if error.errno() == libc::EFAULT => return Ok(()),
            Err(error) => return Err(failed(error)),
        };
        match exit {
            // Shadow paging: the page tables cannot be read, nor can those of the fault's handler.
            VcpuExit::Shutdown | VcpuExit::InternalError => Ok(()),
            // As EFAULT, where KVM tells the address with it (KVM_CAP_MEMORY_FAULT_INFO).
            VcpuExit::MemoryFault { .. } => Ok(()),
            // An access, say, whose completion would be left over.
            other => Err(RunError::Unexpected {
                vcpu,
                exit: format!("{other:?}"),
            }),
        }
    }

    /// Takes over a state. The vCPU has not run yet, but to be warmed up.
    pub(crate) fn restore(
        &mut self,
        state: &VcpuState,
        saved: Clock,
        now: Clock,
    ) -> Result<(), StateError> {
        let has = self.has.take().filter(|has| has.has_cpuid_of(state));
        if has.is_none() {
            state.set_cpuid(&self.fd)?;
        }
        state.restore(&self.fd, self.abilities, has.as_ref(), saved, now)
    }

    /// Goes back to the state that it was started from, and forgets all translations. Its CPUID stays:
    /// KVM fixes it with the first run.
    pub(crate) fn rewind(
        &mut self,
        state: &VcpuState,
        saved: Clock,
        now: Clock,
    ) -> Result<(), StateError> {
        flush_tlb(&self.fd, state.sregs())?;
        disarm(&self.fd)?;
        state.restore(&self.fd, self.abilities, None, saved, now)
    }

    /// Tells a guest that uses kvmclock that it was paused, so that its watchdogs do not bark
    /// (KVM_KVMCLOCK_CTRL, KVM API 4.70).
    pub(crate) fn note_pause(&self) -> io::Result<()> {
        match self.fd.kvmclock_ctrl() {
            // The guest does not use kvmclock.
            Err(error) if error.errno() == libc::EINVAL => Ok(()),
            other => other.map_err(Into::into),
        }
    }

    /// Runs guest code until something has to be told or the thread is kicked. The last exit may
    /// be unfinished: see [`Vcpu::finish`].
    pub(crate) fn run(&mut self, buses: &Buses) -> Result<Stop, RunError> {
        loop {
            match self.step(buses)? {
                None | Some(Stop::Effect(Effect::None)) => {}
                Some(stop) => return Ok(stop),
            }
        }
    }

    /// Finishes the instruction of the last exit without running another one. KVM completes an I/O
    /// or MMIO instruction only on the next KVM_RUN, and a wide access takes several: until EINTR
    /// the registers are not those of an instruction boundary. Returns what a further part of the
    /// instruction meant, if it meant something.
    pub(crate) fn finish(&mut self, buses: &Buses) -> Result<Option<Stop>, RunError> {
        let mut meant = None;
        loop {
            self.fd.set_kvm_immediate_exit(1);
            match self.step(buses)? {
                Some(Stop::Kicked) => return Ok(meant),
                None | Some(Stop::Effect(Effect::None)) => {}
                Some(stop) => meant = Some(stop),
            }
        }
    }

    /// One KVM_RUN; `None` is an exit that was served and means nothing to others.
    fn step(&mut self, buses: &Buses) -> Result<Option<Stop>, RunError> {
        let kvm_run = std::ptr::from_mut(self.fd.get_kvm_run());
        // SAFETY: the mapping lives as long as `self.fd`. The member is `io` after an I/O exit, which
        // is the only time that this is called, and `run` leaves a shared view of it alone.
        let io_width = || usize::from(unsafe { (*kvm_run).__bindgen_anon_1.io.size });
        let has_software = self.software.is_some();
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            Err(error) => match error.errno() {
                libc::EINTR => {
                    self.fd.set_kvm_immediate_exit(0);
                    return Ok(Some(Stop::Kicked));
                }
                // A vCPU that waits for its SIPI was woken by something else.
                libc::EAGAIN => return Ok(None),
                _ => {
                    return Err(RunError::Call {
                        vcpu: self.index,
                        source: error.into(),
                    });
                }
            },
        };
        let for_software = match exit {
            VcpuExit::IoIn(port, data) => {
                buses.pio.read_repeated(u64::from(port), io_width(), data);
                return Ok(None);
            }
            VcpuExit::IoOut(port, data) => {
                let effect = buses.pio.write_repeated(u64::from(port), io_width(), data);
                return Ok(Some(Stop::Effect(effect)));
            }
            VcpuExit::MmioRead(address, data) => {
                buses.mmio.read(address, data);
                return Ok(None);
            }
            VcpuExit::MmioWrite(address, _) if has_software && SoftwareKvm::is_syscall(address) => {
                ForSoftware::Syscall
            }
            VcpuExit::MmioWrite(address, data) => {
                return Ok(Some(Stop::Effect(buses.mmio.write(address, data))));
            }
            VcpuExit::X86Wrmsr(write) => {
                *write.error = 0;
                ForSoftware::MsrWrite {
                    msr: write.index,
                    value: write.data,
                }
            }
            VcpuExit::X86Rdmsr(read) => {
                let value = self
                    .software
                    .as_ref()
                    .and_then(|it| it.msr_read(read.index));
                *read.error = u8::from(value.is_none());
                *read.data = value.unwrap_or(0);
                return Ok(None);
            }
            VcpuExit::Shutdown => return Ok(Some(Stop::TripleFault)),
            VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _) => {
                return Ok(Some(Stop::SystemEvent { reset: true }));
            }
            VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _) => {
                return Ok(Some(Stop::SystemEvent { reset: false }));
            }
            VcpuExit::Intr | VcpuExit::IrqWindowOpen => return Ok(None),
            VcpuExit::FailEntry(reason, _cpu) => {
                return Err(RunError::FailEntry {
                    vcpu: self.index,
                    reason,
                });
            }
            VcpuExit::InternalError => ForSoftware::Refused,
            other => {
                let exit = format!("{other:?}");
                return Err(RunError::Unexpected {
                    vcpu: self.index,
                    exit,
                });
            }
        };
        self.by_software(for_software).map(|()| None)
    }

    /// What a KVM that is software leaves to us.
    fn by_software(&mut self, what: ForSoftware) -> Result<(), RunError> {
        let vcpu = self.index;
        let refused = matches!(what, ForSoftware::Refused);
        if refused && self.suberror() != KVM_INTERNAL_ERROR_EMULATION {
            return Err(self.internal_error());
        }
        let Some(software) = &mut self.software else {
            return Err(self.internal_error());
        };
        let done = match what {
            ForSoftware::Syscall => software.syscall(&self.fd),
            ForSoftware::MsrWrite { msr, value } => software.msr_written(&self.fd, msr, value),
            ForSoftware::Refused => match software.instruction(&self.fd) {
                Ok(Outcome::Done { .. }) => Ok(()),
                Ok(Outcome::Unknown { code }) => return Err(self.cannot_emulate(&code)),
                Err(error) => Err(error),
            },
        };
        done.map_err(|source| RunError::SoftwareKvm { vcpu, source })
    }

    /// Of a KVM_EXIT_INTERNAL_ERROR.
    fn suberror(&mut self) -> u32 {
        let run = self.fd.get_kvm_run();
        // SAFETY: the exit reason is KVM_EXIT_INTERNAL_ERROR, for which this is the union's member.
        unsafe { run.__bindgen_anon_1.internal.suberror }
    }

    /// KVM gave up: most often it met an instruction that it cannot emulate.
    fn internal_error(&mut self) -> RunError {
        let suberror = self.suberror();
        if suberror != KVM_INTERNAL_ERROR_EMULATION {
            return RunError::Internal {
                vcpu: self.index,
                suberror,
                rip: self.rip(),
            };
        }
        let run = self.fd.get_kvm_run();
        // SAFETY: the exit reason is KVM_EXIT_INTERNAL_ERROR with this suberror, for which this is the
        // union's member.
        let failure = unsafe { run.__bindgen_anon_1.emulation_failure };
        // SAFETY: the member is plain bytes, present when ndata counts them.
        let bytes = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
        let len = if failure.ndata >= 3 {
            usize::from(bytes.insn_size).min(15)
        } else {
            0
        };
        self.cannot_emulate(&bytes.insn_bytes[..len])
    }

    fn cannot_emulate(&self, code: &[u8]) -> RunError {
        let code: Vec<_> = code.iter().map(|byte| format!("{byte:02x}")).collect();
        RunError::Emulation {
            vcpu: self.index,
            rip: self.rip(),
            code: code.join(" "),
        }
    }

    fn rip(&self) -> u64 {
        self.fd.get_regs().map_or(0, |regs| regs.rip)
    }
}

/// Why a vCPU cannot go on: a failure of the host or of KVM, not of the guest.
#[derive(Debug, Error)]
pub enum RunError {
    /// KVM_RUN failed.
    #[error("vCPU {vcpu}: KVM_RUN failed")]
    Call {
        /// The vCPU.
        vcpu: u32,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The hardware refused the vCPU's state.
    #[error("vCPU {vcpu}: the CPU refused to enter the guest, hardware reason {reason:#x}")]
    FailEntry {
        /// The vCPU.
        vcpu: u32,
        /// KVM_EXIT_FAIL_ENTRY's reason.
        reason: u64,
    },
    /// An instruction that KVM cannot emulate.
    #[error("vCPU {vcpu}: KVM cannot emulate the instruction at {rip:#x} (bytes: {code})")]
    Emulation {
        /// The vCPU.
        vcpu: u32,
        /// Where.
        rip: u64,
        /// The instruction's bytes in hex, as far as KVM gave them.
        code: String,
    },
    /// Another internal error of KVM.
    #[error("vCPU {vcpu}: KVM internal error {suberror} at {rip:#x}")]
    Internal {
        /// The vCPU.
        vcpu: u32,
        /// KVM_INTERNAL_ERROR_*.
        suberror: u32,
        /// Where.
        rip: u64,
    },
    /// An exit that this machine never asks for.
    #[error("vCPU {vcpu}: unexpected exit from KVM_RUN: {exit}")]
    Unexpected {
        /// The vCPU.
        vcpu: u32,
        /// The exit.
        exit: String,
    },
    /// What this software KVM lacks could not be made up for.
    #[error("vCPU {vcpu}: this KVM is software, and what it lacks could not be made up for")]
    SoftwareKvm {
        /// The vCPU.
        vcpu: u32,
        /// Why.
        #[source]
        source: SoftwareKvmError,
    },
    /// The thread that ran it panicked.
    #[error("vCPU {vcpu}: its thread panicked; this is a bug in forkvm")]
    Panicked {
        /// The vCPU.
        vcpu: u32,
    },
}
