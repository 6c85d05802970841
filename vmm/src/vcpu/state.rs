//! The complete state of a vCPU, in the order that KVM needs.
//!
//! Everything that KVM lets user space read is here; what a class is for, and why it is read or
//! written at its place, stands beside it. A class that is forgotten is silent corruption of a
//! clone: the `registers` job of the bare guest fills each one and checks it after a fork.

use std::io;

use kvm_bindings::{
    CpuId, KVM_SREGS2_FLAGS_PDPTRS_VALID, KVM_VCPUEVENT_VALID_TRIPLE_FAULT, kvm_cpuid_entry2,
    kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_sregs, kvm_sregs2, kvm_vcpu_events,
    kvm_xcrs,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use forkvm_devices::SavedState;

use super::msrs::{self, MsrError};
use super::{MsrCatalogue, sys};
use crate::tsc::host_tsc;

/// What the clocks of a machine showed when it was saved, read once for all its vCPUs so that they
/// agree afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Clock {
    /// The host's TSC.
    pub(crate) host_tsc: u64,
}

impl Clock {
    pub(crate) fn now() -> Clock {
        Clock {
            host_tsc: host_tsc(),
        }
    }
}

/// Section `kvm/vcpu/<n>`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct VcpuState {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    /// PAE page-directory pointers, which SREGS leaves out; `None` outside of PAE paging.
    pdptrs: Option<[u64; 4]>,
    xcrs: kvm_xcrs,
    /// XSAVE area without the zeros at its end.
    #[serde(with = "serde_bytes")]
    xsave: Vec<u8>,
    debug_regs: kvm_debugregs,
    msrs: Vec<(u32, u64)>,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
    cpuid: Vec<kvm_cpuid_entry2>,
    tsc_khz: u32,
    /// Guest TSC minus host TSC; `None` where KVM has no such attribute (the MSR is used then).
    tsc_offset: Option<u64>,
}

impl SavedState for VcpuState {
    const VERSION: u16 = 1;
}

/// What the VM of a vCPU can save, beyond what every KVM can.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Abilities {
    /// Size of the XSAVE area in bytes (KVM_CAP_XSAVE2).
    pub(crate) xsave_size: usize,
    /// KVM_CAP_SREGS2.
    pub(crate) sregs2: bool,
    /// KVM_CAP_X86_TRIPLE_FAULT_EVENT, enabled: a pending triple fault is part of the events.
    pub(crate) triple_fault_event: bool,
}

/// Offset of the timer's initial count in the LAPIC's registers (Intel SDM volume 3, "APIC Timer").
const LAPIC_INITIAL_COUNT: usize = 0x380;

const CR4_PAE: u64 = 1 << 5;
const CR4_PGE: u64 = 1 << 7;
const CR0_PG: u64 = 1 << 31;
const EFER_LMA: u64 = 1 << 10;

fn in_pae_paging(sregs: &kvm_sregs) -> bool {
    sregs.cr0 & CR0_PG != 0 && sregs.cr4 & CR4_PAE != 0 && sregs.efer & EFER_LMA == 0
}

impl VcpuState {
    /// Where the guest goes on.
    pub(crate) fn rip(&self) -> u64 {
        self.regs.rip
    }

    /// The general registers.
    pub(super) fn regs(&self) -> &kvm_regs {
        &self.regs
    }

    /// Segments, descriptor tables and control registers.
    pub(super) fn sregs(&self) -> &kvm_sregs {
        &self.sregs
    }

    /// KVM_MP_STATE: 0 runnable, 1 uninitialised, 3 halted, ….
    pub(crate) fn mp_state(&self) -> u32 {
        self.mp_state.mp_state
    }

    /// A state that is all zero but for these registers.
    #[cfg(test)]
    pub(super) fn with(mp_state: u32, regs: kvm_regs, sregs: kvm_sregs) -> VcpuState {
        VcpuState {
            mp_state: kvm_mp_state { mp_state },
            regs,
            sregs,
            pdptrs: None,
            xcrs: kvm_xcrs::default(),
            xsave: Vec::new(),
            debug_regs: kvm_debugregs::default(),
            msrs: Vec::new(),
            lapic: kvm_lapic_state::default(),
            events: kvm_vcpu_events::default(),
            cpuid: Vec::new(),
            tsc_khz: 0,
            tsc_offset: None,
        }
    }

    /// Reads the state. The vCPU must be outside of KVM_RUN with its last exit finished.
    pub(crate) fn save(
        vcpu: &VcpuFd,
        abilities: Abilities,
        catalogue: &MsrCatalogue,
    ) -> Result<VcpuState, StateError> {
        // First, because reading it makes KVM take in INIT and SIPI that are still pending, which
        // changes registers.
        let mp_state = vcpu.get_mp_state().map_err(reading("MP_STATE"))?;
        let regs = vcpu.get_regs().map_err(reading("REGS"))?;
        let mut sregs = vcpu.get_sregs().map_err(reading("SREGS"))?;
        // The interrupt that is being delivered is in VCPU_EVENTS; twice would inject it twice.
        sregs.interrupt_bitmap = [0; 4];
        let pdptrs = if abilities.sregs2 && in_pae_paging(&sregs) {
            let sregs2 = sys::get_sregs2(vcpu).map_err(reading_io("SREGS2"))?;
            (sregs2.flags & u64::from(KVM_SREGS2_FLAGS_PDPTRS_VALID) != 0).then_some(sregs2.pdptrs)
        } else {
            None
        };
        let xcrs = vcpu.get_xcrs().map_err(reading("XCRS"))?;
        let mut xsave = sys::get_xsave(vcpu, abilities.xsave_size).map_err(reading_io("XSAVE2"))?;
        xsave.truncate(
            xsave
                .iter()
                .rposition(|&byte| byte != 0)
                .map_or(0, |last| last + 1),
        );
        let debug_regs = vcpu.get_debug_regs().map_err(reading("DEBUGREGS"))?;
        // Before the LAPIC: a TSC deadline that passes in between then shows as armed here and as
        // a pending interrupt there, one tick too many. The other way round it would be lost.
        let msrs = catalogue.save(vcpu)?;
        let lapic = vcpu.get_lapic().map_err(reading("LAPIC"))?;
        // Last: what is about to be injected.
        let events = vcpu.get_vcpu_events().map_err(reading("VCPU_EVENTS"))?;
        let mut cpuid = vcpu
            .get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .map_err(reading("CPUID2"))?
            .as_slice()
            .to_vec();
        // Older kernels (6.1 is one) do not say how many entries it filled in; leaf 0 is never empty.
        let empty = kvm_cpuid_entry2::default();
        cpuid.truncate(
            cpuid
                .iter()
                .rposition(|entry| *entry != empty)
                .map_or(0, |last| last + 1),
        );
        let tsc_khz = vcpu.get_tsc_khz().map_err(reading("TSC_KHZ"))?;
        let tsc_offset = sys::get_tsc_offset(vcpu).map_err(reading_io("TSC_OFFSET"))?;
        Ok(VcpuState {
            mp_state,
            regs,
            sregs,
            pdptrs,
            xcrs,
            xsave,
            debug_regs,
            msrs,
            lapic,
            events,
            cpuid,
            tsc_khz,
            tsc_offset,
        })
    }

    /// Puts into `vcpu`, which is fresh, what of this state can be put in ahead of time: all that stays
    /// as it is until the vCPU runs, needs no guest memory and does nothing by itself. Returns what
    /// the vCPU says that it has then.
    ///
    /// A restore holds its own state against that and sets what differs, so what is put in here decides
    /// about speed only.
    pub(super) fn prime(
        &self,
        vcpu: &VcpuFd,
        abilities: Abilities,
        catalogue: &MsrCatalogue,
    ) -> Result<VcpuState, StateError> {
        if !in_pae_paging(&self.sregs) {
            vcpu.set_sregs(&self.sregs).map_err(writing("SREGS"))?;
            if self.timer_is_off() {
                vcpu.set_lapic(&self.lapic).map_err(writing("LAPIC"))?;
            }
        }
        vcpu.set_regs(&self.regs).map_err(writing("REGS"))?;
        vcpu.set_xcrs(&self.xcrs).map_err(writing("XCRS"))?;
        sys::set_xsave(vcpu, abilities.xsave_size, &self.xsave).map_err(writing_io("XSAVE"))?;
        vcpu.set_debug_regs(&self.debug_regs)
            .map_err(writing("DEBUGREGS"))?;
        let at_rest = self.msrs.iter().filter(|msr| !msrs::acts(msr.0));
        msrs::restore(vcpu, &at_rest.copied().collect::<Vec<_>>())?;
        let mut has = VcpuState::save(vcpu, abilities, catalogue)?;
        // As it was given: KVM shows some leaves as the registers of the moment have them.
        has.cpuid.clone_from(&self.cpuid);
        Ok(has)
    }

    /// Whether no timer of the LAPIC is going to fire.
    fn timer_is_off(&self) -> bool {
        let deadline = self.msrs.iter().find(|msr| msr.0 == msrs::TSC_DEADLINE);
        let count = &self.lapic.regs[LAPIC_INITIAL_COUNT..LAPIC_INITIAL_COUNT + 4];
        deadline.is_none_or(|msr| msr.1 == 0) && count.iter().all(|&byte| byte == 0)
    }

    /// Whether a vCPU with this state has the CPUID of `other`.
    pub(crate) fn has_cpuid_of(&self, other: &VcpuState) -> bool {
        self.cpuid == other.cpuid
    }

    /// Decides which registers and MSRs exist.
    pub(super) fn set_cpuid(&self, vcpu: &VcpuFd) -> Result<(), StateError> {
        let cpuid = CpuId::from_entries(&self.cpuid)
            .map_err(|error| writing_io("CPUID2")(io::Error::other(format!("{error:?}"))))?;
        vcpu.set_cpuid2(&cpuid).map_err(writing("CPUID2"))
    }

    /// Puts the state into a vCPU that has the state's CPUID already: it decides which registers and
    /// MSRs exist. `saved` is when the machine was saved and `now` one instant for all its vCPUs: the
    /// guest's TSC goes on from where it stood. What the vCPU `has` already, by
    /// [`prime`](VcpuState::prime), is not set again; without that all of it is set, whatever the vCPU
    /// has done so far.
    pub(crate) fn restore(
        &self,
        vcpu: &VcpuFd,
        abilities: Abilities,
        has: Option<&VcpuState>,
        saved: Clock,
        now: Clock,
    ) -> Result<(), StateError> {
        // The arithmetic of the offset below is in host ticks: scaling would need both rates.
        let here = match has {
            Some(has) => has.tsc_khz,
            None => vcpu.get_tsc_khz().map_err(reading("TSC_KHZ"))?,
        };
        if here != self.tsc_khz {
            return Err(StateError::TscKhz {
                saved: self.tsc_khz,
                here,
            });
        }
        if has.is_none_or(|has| has.mp_state != self.mp_state) {
            vcpu.set_mp_state(self.mp_state)
                .map_err(writing("MP_STATE"))?;
        }
        // Control registers and segments before all that is interpreted under them.
        let sregs_differ = has.is_none_or(|has| has.sregs != self.sregs);
        if sregs_differ {
            vcpu.set_sregs(&self.sregs).map_err(writing("SREGS"))?;
        }
        if let Some(pdptrs) = self.pdptrs {
            if !abilities.sregs2 {
                return Err(StateError::Lacks {
                    what: "KVM_CAP_SREGS2 (PAE page directories)",
                });
            }
            let sregs2 = with_pdptrs(&self.sregs, pdptrs);
            sys::set_sregs2(vcpu, &sregs2).map_err(writing_io("SREGS2"))?;
        }
        if has.is_none_or(|has| has.regs != self.regs) {
            vcpu.set_regs(&self.regs).map_err(writing("REGS"))?;
        }
        // XCR0 before the area whose components it enables.
        let xcrs_differ = has.is_none_or(|has| has.xcrs != self.xcrs);
        if xcrs_differ {
            vcpu.set_xcrs(&self.xcrs).map_err(writing("XCRS"))?;
        }
        if xcrs_differ || has.is_none_or(|has| has.xsave != self.xsave) {
            sys::set_xsave(vcpu, abilities.xsave_size, &self.xsave).map_err(writing_io("XSAVE"))?;
        }
        if has.is_none_or(|has| has.debug_regs != self.debug_regs) {
            vcpu.set_debug_regs(&self.debug_regs)
                .map_err(writing("DEBUGREGS"))?;
        }
        // After SREGS, which hold the APIC base, and before the timer's deadline below.
        if sregs_differ || has.is_none_or(|has| has.lapic != self.lapic) {
            vcpu.set_lapic(&self.lapic).map_err(writing("LAPIC"))?;
        }
        self.restore_msrs(vcpu, has, saved, now)?;
        // Last, so that nothing above drops an event that is about to be injected; and always, since
        // some of it does.
        let mut events = self.events;
        if !abilities.triple_fault_event {
            events.flags &= !KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
        }
        vcpu.set_vcpu_events(&events)
            .map_err(writing("VCPU_EVENTS"))?;
        Ok(())
    }

    /// MSRs in three steps: all but time; the TSC; the deadline that is counted in it. Those in which
    /// SREGS or the LAPIC show come from the same state, so that it does not matter whether those were
    /// set in between.
    fn restore_msrs(
        &self,
        vcpu: &VcpuFd,
        has: Option<&VcpuState>,
        saved: Clock,
        now: Clock,
    ) -> Result<(), StateError> {
        let time = |msr: &(u32, u64)| matches!(msr.0, msrs::TSC | msrs::TSC_DEADLINE);
        let has_it = |msr: &(u32, u64)| has.is_some_and(|has| has.msrs.binary_search(msr).is_ok());
        let rest = self.msrs.iter().filter(|msr| !time(msr) && !has_it(msr));
        msrs::restore(vcpu, &rest.copied().collect::<Vec<_>>())?;
        let only = |index| self.msrs.iter().filter(move |msr| msr.0 == index).copied();
        match self.tsc_offset {
            Some(offset) => {
                let slept = now.host_tsc.wrapping_sub(saved.host_tsc);
                sys::set_tsc_offset(vcpu, offset.wrapping_sub(slept))
                    .map_err(writing_io("TSC_OFFSET"))?;
            }
            None => msrs::restore(vcpu, &only(msrs::TSC).collect::<Vec<_>>())?,
        }
        let deadline = only(msrs::TSC_DEADLINE).filter(|msr| !has_it(msr));
        msrs::restore(vcpu, &deadline.collect::<Vec<_>>())?;
        Ok(())
    }
}

/// Gives the vCPU `sregs` and has it forget every translation that it holds. Where SREGS stay what they
/// are, KVM has no reason to: hardware would go on with what it cached of page tables that were changed
/// in memory meanwhile. Bit PGE of CR4 makes the difference: it may be set or not in any mode, and a
/// change of it flushes all (Intel SDM volume 3, section 4.10.4.1; AMD APM volume 2, section 5.5.1).
pub(crate) fn flush_tlb(vcpu: &VcpuFd, sregs: &kvm_sregs) -> Result<(), StateError> {
    let mut toggled = *sregs;
    toggled.cr4 ^= CR4_PGE;
    vcpu.set_sregs(&toggled).map_err(writing("SREGS"))?;
    vcpu.set_sregs(sregs).map_err(writing("SREGS"))
}

/// Takes back the deadline of the timer: given the LAPIC of another life, KVM would arm it with the
/// deadline of this one.
pub(crate) fn disarm(vcpu: &VcpuFd) -> Result<(), StateError> {
    Ok(msrs::restore(vcpu, &[(msrs::TSC_DEADLINE, 0)])?)
}

fn with_pdptrs(sregs: &kvm_sregs, pdptrs: [u64; 4]) -> kvm_sregs2 {
    kvm_sregs2 {
        cs: sregs.cs,
        ds: sregs.ds,
        es: sregs.es,
        fs: sregs.fs,
        gs: sregs.gs,
        ss: sregs.ss,
        tr: sregs.tr,
        ldt: sregs.ldt,
        gdt: sregs.gdt,
        idt: sregs.idt,
        cr0: sregs.cr0,
        cr2: sregs.cr2,
        cr3: sregs.cr3,
        cr4: sregs.cr4,
        cr8: sregs.cr8,
        efer: sregs.efer,
        apic_base: sregs.apic_base,
        flags: u64::from(KVM_SREGS2_FLAGS_PDPTRS_VALID),
        pdptrs,
    }
}

/// Why the state of a vCPU or of its VM could not be read or put in.
#[derive(Debug, Error)]
pub enum StateError {
    /// A register class could not be read.
    #[error("reading the vCPU's {class} from KVM failed")]
    Read {
        /// KVM's name of the class.
        class: &'static str,
        /// What KVM said.
        #[source]
        source: io::Error,
    },
    /// A register class was refused.
    #[error("KVM refused the saved {class}: the state is damaged or from another kind of host")]
    Write {
        /// KVM's name of the class.
        class: &'static str,
        /// What KVM said.
        #[source]
        source: io::Error,
    },
    /// An MSR.
    #[error(transparent)]
    Msr(#[from] MsrError),
    /// The guest's TSC ticks at another rate than this host's.
    #[error(
        "the guest's TSC ticks at {saved} kHz and this host's at {here}: restore it on a host of \
         the same frequency"
    )]
    TscKhz {
        /// What the guest was saved with.
        saved: u32,
        /// What a vCPU has here.
        here: u32,
    },
    /// This host's KVM has no place for a part of the state.
    #[error("the saved vCPU needs {what}, which this KVM lacks: a newer host kernel is needed")]
    Lacks {
        /// What is lacking.
        what: &'static str,
    },
}

pub(crate) fn reading(class: &'static str) -> impl Fn(kvm_ioctls::Error) -> StateError {
    move |error| StateError::Read {
        class,
        source: error.into(),
    }
}

pub(crate) fn reading_io(class: &'static str) -> impl Fn(io::Error) -> StateError {
    move |source| StateError::Read { class, source }
}

pub(crate) fn writing(class: &'static str) -> impl Fn(kvm_ioctls::Error) -> StateError {
    move |error| StateError::Write {
        class,
        source: error.into(),
    }
}

pub(crate) fn writing_io(class: &'static str) -> impl Fn(io::Error) -> StateError {
    move |source| StateError::Write { class, source }
}
