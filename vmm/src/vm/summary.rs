//! What a machine's state says, for people. Called by `forkvm state show`; restores nothing.

use forkvm_devices::{SavedState, SectionError, Sections};

use super::state::{CONFIG, HOST, HostState, MEMORY, MemoryState, vcpu_section};
use crate::machine::VmConfig;
use crate::memory::RamRegion;
use crate::vcpu::VcpuState;

/// The decoded parts of a state that tell machines apart.
#[derive(Clone, Debug)]
pub struct MachineSummary {
    /// Where it was saved.
    pub host: String,
    /// What it is.
    pub config: VmConfig,
    /// Where its RAM lies.
    pub regions: Vec<RamRegion>,
    /// Its vCPUs, in order.
    pub vcpus: Vec<VcpuSummary>,
}

/// Where a vCPU stands.
#[derive(Clone, Debug)]
pub struct VcpuSummary {
    /// Address of its next instruction.
    pub rip: u64,
    /// What it does (KVM_GET_MP_STATE, KVM API 4.38).
    pub activity: &'static str,
}

impl MachineSummary {
    /// Decodes it; an error names the section that is missing or cannot be read.
    pub fn of(sections: &Sections) -> Result<MachineSummary, SectionError> {
        let host: HostState = decode(sections, HOST)?;
        let config: VmConfig = decode(sections, CONFIG)?;
        let memory: MemoryState = decode(sections, MEMORY)?;
        let vcpu = |index| -> Result<VcpuSummary, SectionError> {
            let state: VcpuState = decode(sections, &vcpu_section(index))?;
            Ok(VcpuSummary {
                rip: state.rip(),
                activity: activity(state.mp_state()),
            })
        };
        Ok(MachineSummary {
            host: host.text(),
            vcpus: (0..config.vcpus).map(vcpu).collect::<Result<_, _>>()?,
            config,
            regions: memory.layout.regions().to_vec(),
        })
    }
}

fn decode<T: SavedState>(sections: &Sections, kind: &str) -> Result<T, SectionError> {
    match sections.find(kind) {
        Some(section) => section.decode(),
        None => Err(SectionError::Missing {
            kind: kind.to_owned(),
        }),
    }
}

fn activity(mp_state: u32) -> &'static str {
    match mp_state {
        kvm_bindings::KVM_MP_STATE_RUNNABLE => "runs",
        kvm_bindings::KVM_MP_STATE_UNINITIALIZED => "waits for INIT",
        kvm_bindings::KVM_MP_STATE_INIT_RECEIVED => "waits for SIPI",
        kvm_bindings::KVM_MP_STATE_SIPI_RECEIVED => "starts",
        kvm_bindings::KVM_MP_STATE_HALTED => "halted",
        _ => "in another state",
    }
}
