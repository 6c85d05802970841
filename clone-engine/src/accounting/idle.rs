//! What a clone takes that does nothing: what is asked of the host before it is made, and what KVM
//! keeps of it without counting.
//!
//! The constants were measured by `cargo bench --bench fork -- memory` on kvm-pvm, Linux 6.18, with 100
//! clones of VMs with 64 and 512 MiB, 1 and 4 vCPUs: growth of Slab, VmallocUsed, PageTables,
//! SecPageTables and Percpu of the host, and of Anonymous of the process, per clone.

use std::fs;
use std::sync::OnceLock;

use forkvm_vmm::VmConfig;

/// KVM's structures of a VM: irqchip, buses, memory slot, and the stacks of the two threads that each
/// VM has beside its vCPUs.
const VM_KIB: u64 = 182;
/// KVM's structures of a vCPU, and the stack of its thread.
const VCPU_KIB: u64 = 98;
/// Stack and heap of the VMM, pages that the guest writes when it first runs, and page tables, of a VM
/// and of each vCPU. All of it twice: a guest that does a little more is idle as well.
const VMM_KIB: u64 = 2 * 92;
const VMM_VCPU_KIB: u64 = 2 * 16;
/// What KVM keeps for each MiB of RAM, present or not, where it shadows the guest's page tables: 8
/// bytes for the reverse map of each page and 2 for its write tracking.
const SHADOWED_BYTES_PER_MIB: u64 = 2560;

/// All of it, in KiB: what each clone of such a machine takes of the host at least.
pub(crate) fn kib(config: &VmConfig) -> u64 {
    VMM_KIB + VMM_VCPU_KIB * u64::from(config.vcpus) + objects_kib(config) + slots_kib(config)
}

/// KVM's structures and the kernel's stacks.
pub(super) fn objects_kib(config: &VmConfig) -> u64 {
    VM_KIB + VCPU_KIB * u64::from(config.vcpus)
}

/// What grows with the RAM of the machine, whether it is populated or not.
pub(super) fn slots_kib(config: &VmConfig) -> u64 {
    if shadows_page_tables() {
        config.memory_mib * SHADOWED_BYTES_PER_MIB / 1024
    } else {
        0
    }
}

/// Whether KVM keeps reverse maps for all RAM from the start: kvm-pvm, and VMX and SVM without EPT or
/// NPT or without KVM's newer MMU for them.
fn shadows_page_tables() -> bool {
    static SHADOWS: OnceLock<bool> = OnceLock::new();
    *SHADOWS.get_or_init(|| {
        let is_on = |parameter: &str| {
            fs::read_to_string(format!("/sys/module/{parameter}"))
                .is_ok_and(|value| matches!(value.trim(), "Y" | "1"))
        };
        let nested = is_on("kvm_intel/parameters/ept") || is_on("kvm_amd/parameters/npt");
        !(nested && is_on("kvm/parameters/tdp_mmu"))
    })
}
