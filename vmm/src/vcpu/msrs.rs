//! Model-specific registers: which ones make up a vCPU's state.
//!
//! KVM lists the MSRs that it wants saved (KVM_GET_MSR_INDEX_LIST), but not all: [`UNLISTED`] names
//! those that it also keeps per vCPU, each with the reason why a fork must carry it. Which of them
//! can be read depends on the host and on the vCPU's CPUID (since Linux 6.13), so the first vCPU of
//! the process is asked once.

use std::io;

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

/// IA32_TIME_STAMP_COUNTER. Set through the TSC offset where KVM has that.
pub(crate) const TSC: u32 = 0x10;
/// IA32_TSC_DEADLINE. Set last: arming the timer needs the TSC and the LAPIC in place.
pub(crate) const TSC_DEADLINE: u32 = 0x6e0;
/// IA32_MCG_CAP: low 8 bits are the number of machine-check banks.
const MCG_CAP: u32 = 0x179;
/// First machine-check bank: CTL, STATUS, ADDR, MISC, then those of the next bank.
const MCE_BANK0: u32 = 0x400;

/// Ranges of MSRs that KVM keeps for a vCPU but leaves out of its list.
const UNLISTED: &[(std::ops::RangeInclusive<u32>, &str)] = &[
    (
        0xc000_0103..=0xc000_0103,
        "TSC_AUX: what RDTSCP and RDPID return; Linux keeps the CPU there",
    ),
    (
        0x48..=0x48,
        "SPEC_CTRL: the guest's own speculation mitigations",
    ),
    (
        0xc001_011f..=0xc001_011f,
        "VIRT_SPEC_CTRL: the same on older AMD",
    ),
    (
        0xfe..=0xfe,
        "MTRR_CAP: how many variable ranges the guest was told of",
    ),
    (
        0x200..=0x20f,
        "MTRR_PHYSBASE/PHYSMASK: memory types that the guest set",
    ),
    (0x250..=0x250, "MTRR_FIX64K: memory types below 512 KiB"),
    (0x258..=0x259, "MTRR_FIX16K: memory types up to 768 KiB"),
    (0x268..=0x26f, "MTRR_FIX4K: memory types up to 1 MiB"),
    (
        0x277..=0x277,
        "PAT: memory types that page tables choose from",
    ),
    (
        0x2ff..=0x2ff,
        "MTRR_DEF_TYPE: memory type of everything else",
    ),
    (0x179..=0x17b, "MCG_CAP, STATUS, CTL: machine-check state"),
    (
        0x1d9..=0x1d9,
        "DEBUGCTL: branch tracing that the guest switched on",
    ),
    (
        0x1fc..=0x1fc,
        "POWER_CTL: written by some guests, read back",
    ),
    (
        0x8b..=0x8b,
        "UCODE_REV: the microcode revision that the guest was shown",
    ),
    (
        0xc000_0080..=0xc000_0080,
        "EFER: also in SREGS; here so that a difference shows",
    ),
    (
        0xc000_0100..=0xc000_0102,
        "FS, GS and kernel GS base: also in SREGS but for the last",
    ),
];

/// Whether a write to the MSR does more than to keep the value: it writes guest memory, or counts from
/// then on. Such a one is set when the machine is about to run, never ahead.
pub(super) fn acts(index: u32) -> bool {
    /// kvmclock and its like (KVM's cpuid.rst and msr.rst), the older numbers first.
    const PARAVIRTUAL: [std::ops::RangeInclusive<u32>; 2] =
        [0x11..=0x12, 0x4b56_4d00..=0x4b56_4dff];
    matches!(index, TSC | TSC_DEADLINE) || PARAVIRTUAL.iter().any(|range| range.contains(&index))
}

/// The MSRs that can be read from a vCPU of this process.
#[derive(Clone, Debug)]
pub(crate) struct MsrCatalogue {
    indices: Vec<u32>,
}

impl MsrCatalogue {
    /// Asks `vcpu`, whose CPUID is set, for each listed and each known other MSR.
    pub(super) fn probe(kvm: &kvm_ioctls::Kvm, vcpu: &VcpuFd) -> io::Result<MsrCatalogue> {
        let listed = kvm.get_msr_index_list()?;
        let mut candidates = listed.as_slice().to_vec();
        candidates.extend(UNLISTED.iter().flat_map(|(range, _)| range.clone()));
        let banks = read(vcpu, &[MCG_CAP])?
            .first()
            .map_or(0, |msr| msr.1 as u32 & 0xff);
        candidates.extend(MCE_BANK0..MCE_BANK0 + 4 * banks);
        candidates.sort_unstable();
        candidates.dedup();
        let mut indices = Vec::new();
        for index in candidates {
            if read(vcpu, &[index])?.is_empty() {
                tracing::debug!(
                    index = format_args!("{index:#x}"),
                    "MSR cannot be read here"
                );
            } else {
                indices.push(index);
            }
        }
        Ok(MsrCatalogue { indices })
    }

    /// Reads them all.
    pub(super) fn save(&self, vcpu: &VcpuFd) -> Result<Vec<(u32, u64)>, MsrError> {
        let values = read(vcpu, &self.indices).map_err(MsrError::Call)?;
        match self.indices.get(values.len()) {
            Some(&index) => Err(MsrError::Unreadable { index }),
            None => Ok(values),
        }
    }
}

/// Most MSRs of one call: KVM refuses 256 and more (E2BIG).
const BATCH: usize = 255;

/// KVM_GET_MSRS: the values up to the first MSR that cannot be read.
fn read(vcpu: &VcpuFd, indices: &[u32]) -> io::Result<Vec<(u32, u64)>> {
    let mut values = Vec::with_capacity(indices.len());
    for batch in indices.chunks(BATCH) {
        let mut msrs = list(batch.iter().map(|&index| (index, 0)))?;
        let count = vcpu.get_msrs(&mut msrs)?;
        values.extend(
            msrs.as_slice()[..count]
                .iter()
                .map(|msr| (msr.index, msr.data)),
        );
        if count < batch.len() {
            break;
        }
    }
    Ok(values)
}

/// Reads one.
pub(crate) fn read_one(vcpu: &VcpuFd, index: u32) -> Result<u64, MsrError> {
    let values = read(vcpu, &[index]).map_err(MsrError::Call)?;
    let (_, value) = values.first().ok_or(MsrError::Unreadable { index })?;
    Ok(*value)
}

/// Sets `values`. KVM_SET_MSRS stops at the first MSR that it refuses: one that already has its
/// value (some are read-only) is passed over, any other is an error that names it.
pub(crate) fn restore(vcpu: &VcpuFd, values: &[(u32, u64)]) -> Result<(), MsrError> {
    let mut rest = values;
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(BATCH)];
        let msrs = list(batch.iter().copied()).map_err(MsrError::Call)?;
        let set = vcpu
            .set_msrs(&msrs)
            .map_err(|error| MsrError::Call(error.into()))?;
        rest = &rest[set..];
        if set == batch.len() {
            continue;
        }
        let (index, value) = rest[0];
        if read(vcpu, &[index]).map_err(MsrError::Call)? != [(index, value)] {
            return Err(MsrError::Refused { index, value });
        }
        rest = &rest[1..];
    }
    Ok(())
}

fn list(values: impl Iterator<Item = (u32, u64)>) -> io::Result<Msrs> {
    let entries: Vec<_> = values
        .map(|(index, data)| kvm_msr_entry {
            index,
            data,
            ..Default::default()
        })
        .collect();
    Msrs::from_entries(&entries).map_err(|error| io::Error::other(format!("{error:?}")))
}

/// What went wrong with an MSR.
#[derive(Debug, thiserror::Error)]
pub enum MsrError {
    /// The call itself failed.
    #[error("KVM_GET_MSRS or KVM_SET_MSRS failed")]
    Call(#[source] io::Error),
    /// An MSR that could be read once no longer can.
    #[error("MSR {index:#x} cannot be read any more")]
    Unreadable {
        /// Its number.
        index: u32,
    },
    /// An MSR was refused.
    #[error(
        "this KVM refuses to set MSR {index:#x} to {value:#x}: the state comes from a host with \
         another CPU or kernel; restore it on one like that"
    )]
    Refused {
        /// Its number.
        index: u32,
        /// What it should have been set to.
        value: u64,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    /// IA32_SYSENTER_CS: every KVM has it, and it takes any value.
    const PLAIN: u32 = 0x174;

    #[test]
    fn more_msrs_than_one_call_takes_are_read_and_set() {
        let Ok(kvm) = kvm_ioctls::Kvm::new() else {
            println!("skipped: this host has no /dev/kvm");
            return;
        };
        let vm = kvm.create_vm().unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        assert_eq!(read(&vcpu, &[PLAIN; 600]).unwrap(), [(PLAIN, 0); 600]);
        let values: Vec<_> = (0..600).map(|value| (PLAIN, value)).collect();
        restore(&vcpu, &values).unwrap();
        assert_eq!(read(&vcpu, &[PLAIN]).unwrap(), [(PLAIN, 599)]);
    }

    #[test]
    fn an_msr_that_is_refused_is_named() {
        let Ok(kvm) = kvm_ioctls::Kvm::new() else {
            println!("skipped: this host has no /dev/kvm");
            return;
        };
        let vm = kvm.create_vm().unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        // No CPU has this one.
        let values = [(PLAIN, 7), (0xdead_beef, 1), (PLAIN, 8)];
        let error = restore(&vcpu, &values).unwrap_err();
        assert!(
            matches!(
                error,
                MsrError::Refused {
                    index: 0xdead_beef,
                    value: 1
                }
            ),
            "{error}"
        );
        assert_eq!(read(&vcpu, &[PLAIN]).unwrap(), [(PLAIN, 7)]);
    }
}
