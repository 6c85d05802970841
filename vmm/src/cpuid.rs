//! The CPUID that a vCPU gets: what KVM can give, less what a fork could not carry, plus who the
//! vCPU is among its siblings.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// Leaf 1, ECX: VMX. Nested state is not saved, so nesting is not offered.
const VMX: u32 = 1 << 5;
/// Leaf 1, ECX: TSC-deadline timer of the LAPIC.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1, ECX: a hypervisor is present.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: the count of logical processors in EBX is valid.
const HTT: u32 = 1 << 28;
/// Leaf 0x8000_0001, ECX: SVM, for the same reason as VMX.
const SVM: u32 = 1 << 2;
/// KVM's feature leaf.
const KVM_FEATURES: u32 = 0x4000_0001;
/// Bits of that leaf for asynchronous page faults (KVM_FEATURE_ASYNC_PF, _VMEXIT, _INT): hidden,
/// since a fork with one outstanding would leave the clone waiting for a page that came elsewhere.
const ASYNC_PF: u32 = 1 << 4 | 1 << 10 | 1 << 14;

/// The CPUID of vCPU `index` of `count`, whose APIC id is its index.
pub(crate) fn for_vcpu(supported: &CpuId, index: u32, count: u32, tsc_deadline: bool) -> CpuId {
    let mut cpuid = supported.clone();
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            0x1 => {
                entry.ecx = (entry.ecx & !VMX) | HYPERVISOR;
                if tsc_deadline {
                    entry.ecx |= TSC_DEADLINE;
                }
                entry.ebx = (entry.ebx & 0xffff) | count << 16 | index << 24;
                if count > 1 {
                    entry.edx |= HTT;
                }
            }
            0xb | 0x1f => topology(entry, index, count),
            KVM_FEATURES => entry.eax &= !ASYNC_PF,
            0x8000_0001 => entry.ecx &= !SVM,
            // AMD: size of the package, APIC id width.
            0x8000_0008 => entry.ecx = (count - 1) | apic_id_bits(count) << 12,
            // AMD: extended APIC id, core id, one thread a core.
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (index, index, 0),
            _ => {}
        }
    }
    cpuid
}

/// Extended topology (Intel SDM, leaf 0BH): one thread a core, all cores in one package.
fn topology(entry: &mut kvm_cpuid_entry2, index: u32, count: u32) {
    const SMT: u32 = 1;
    const CORE: u32 = 2;
    (entry.eax, entry.ebx, entry.ecx) = match entry.index {
        0 => (0, 1, SMT << 8),
        1 => (apic_id_bits(count), count, CORE << 8 | 1),
        level => (0, 0, level),
    };
    entry.edx = index;
}

/// Bits of an APIC id that tell the cores of a package apart.
fn apic_id_bits(count: u32) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported() -> CpuId {
        let entry = |function, index| kvm_cpuid_entry2 {
            function,
            index,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        };
        let entries = [
            entry(1, 0),
            entry(0xb, 0),
            entry(0xb, 1),
            entry(KVM_FEATURES, 0),
            entry(0x8000_0001, 0),
        ];
        CpuId::from_entries(&entries).unwrap()
    }

    fn leaf(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        let found = |entry: &&kvm_cpuid_entry2| (entry.function, entry.index) == (function, index);
        *cpuid.as_slice().iter().find(found).unwrap()
    }

    #[test]
    fn what_a_fork_cannot_carry_is_hidden() {
        let cpuid = for_vcpu(&supported(), 0, 1, true);
        assert_eq!(leaf(&cpuid, 1, 0).ecx & VMX, 0);
        assert_eq!(leaf(&cpuid, 0x8000_0001, 0).ecx & SVM, 0);
        assert_eq!(leaf(&cpuid, KVM_FEATURES, 0).eax & ASYNC_PF, 0);
    }

    #[test]
    fn each_vcpu_learns_its_own_apic_id() {
        let cpuid = for_vcpu(&supported(), 3, 6, true);
        assert_eq!(leaf(&cpuid, 1, 0).ebx >> 24, 3);
        assert_eq!(leaf(&cpuid, 0xb, 0).edx, 3);
        assert_eq!(leaf(&cpuid, 0xb, 1).eax, 3, "six cores need three bits");
    }
}
