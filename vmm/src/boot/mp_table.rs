//! The MP table: tells a kernel without ACPI of its CPUs and how interrupt lines reach them.
//!
//! Intel MultiProcessor Specification 1.4, chapter 4: a floating pointer in the last KiB of conventional
//! memory, and the configuration table right behind it. Lines are those of an ISA bus, one to one: edge
//! triggered, active high, as the machine's devices pulse them.

use forkvm_devices::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

use super::BootError;

/// Where the floating pointer lies: kernels look at the last KiB below 640 KiB.
pub(super) const ADDRESS: u64 = 0x9_fc00;
/// Bytes up to the video memory.
const ROOM: usize = 0x400;

const IOAPIC_ADDRESS: u32 = 0xfec0_0000;
const LAPIC_ADDRESS: u32 = 0xfee0_0000;
/// Of KVM's LAPICs.
const LAPIC_VERSION: u8 = 0x14;
/// Of KVM's I/O APIC.
const IOAPIC_VERSION: u8 = 0x11;
/// Lines of an ISA bus.
const ISA_LINES: u8 = 16;
/// Joins the two controllers of an ISA bus: no device is there.
const CASCADE: u8 = 2;

// Types of entries.
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IOAPIC: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;

// Types of interrupts.
const VECTORED: u8 = 0;
const NMI: u8 = 1;
const EXTINT: u8 = 3;

const ENABLED: u8 = 1;
const BOOT_PROCESSOR: u8 = 1 << 1;
const ALL_LAPICS: u8 = 0xff;

/// Writes it for a machine with so many vCPUs, whose APIC ids are their indices.
pub(super) fn write(memory: &GuestMemory, vcpus: u32) -> Result<(), BootError> {
    let bytes = table(vcpus);
    debug_assert!(bytes.len() <= ROOM, "{} bytes", bytes.len());
    memory
        .write_slice(&bytes, GuestAddress(ADDRESS))
        .map_err(|error| BootError::Write {
            what: "MP table",
            why: error.to_string(),
        })
}

fn table(vcpus: u32) -> Vec<u8> {
    let entries = entries(vcpus as u8);
    let mut pointer = [0; 16];
    pointer[..4].copy_from_slice(b"_MP_");
    pointer[4..8].copy_from_slice(&(ADDRESS as u32 + 16).to_le_bytes());
    pointer[8] = 1; // length in 16 bytes
    pointer[9] = 4; // revision 1.4
    pointer[10] = checksum(&pointer);
    let mut header = [0; 44];
    let len = header.len() + entries.iter().map(Vec::len).sum::<usize>();
    header[..4].copy_from_slice(b"PCMP");
    header[4..6].copy_from_slice(&(len as u16).to_le_bytes());
    header[6] = 4; // revision 1.4
    header[8..16].copy_from_slice(b"FORKVM  ");
    header[16..28].copy_from_slice(b"forkvm      ");
    header[34..36].copy_from_slice(&(entries.len() as u16).to_le_bytes());
    header[36..40].copy_from_slice(&LAPIC_ADDRESS.to_le_bytes());
    let mut config = header.to_vec();
    config.extend(entries.concat());
    config[7] = checksum(&config);
    [pointer.to_vec(), config].concat()
}

fn entries(vcpus: u8) -> Vec<Vec<u8>> {
    // Four bits wide; since the LAPICs of this version it may be that of a CPU.
    let ioapic_id = vcpus.min(15);
    let mut entries = Vec::new();
    for id in 0..vcpus {
        let boot = if id == 0 { BOOT_PROCESSOR } else { 0 };
        // Signature and features are left to CPUID.
        let mut entry = vec![PROCESSOR, id, LAPIC_VERSION, ENABLED | boot];
        entry.extend([0; 16]);
        entries.push(entry);
    }
    entries.push([&[BUS, 0], &b"ISA   "[..]].concat());
    let mut ioapic = vec![IOAPIC, ioapic_id, IOAPIC_VERSION, ENABLED];
    ioapic.extend(IOAPIC_ADDRESS.to_le_bytes());
    entries.push(ioapic);
    for line in (0..ISA_LINES).filter(|&line| line != CASCADE) {
        // Flags 0: as the bus has it.
        entries.push(vec![IO_INTERRUPT, VECTORED, 0, 0, 0, line, ioapic_id, line]);
    }
    for (kind, lapic, lint) in [(EXTINT, 0, 0), (NMI, ALL_LAPICS, 1)] {
        entries.push(vec![LOCAL_INTERRUPT, kind, 0, 0, 0, 0, lapic, lint]);
    }
    entries
}

/// What makes the sum of all bytes 0.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use forkvm_abi::MAX_VCPUS;

    #[test]
    fn both_structures_add_up_to_zero_and_fit_for_any_number_of_vcpus() {
        for vcpus in 1..=MAX_VCPUS {
            let table = table(vcpus);
            assert!(table.len() <= ROOM);
            let (pointer, config) = table.split_at(16);
            assert_eq!(checksum(pointer), 0);
            assert_eq!(checksum(config), 0);
            assert_eq!(
                usize::from(u16::from_le_bytes([config[4], config[5]])),
                config.len()
            );
        }
    }

    #[test]
    fn the_count_of_entries_is_that_of_the_header() {
        let table = table(3);
        let count = u16::from_le_bytes([table[16 + 34], table[16 + 35]]);
        let mut rest = &table[16 + 44..];
        for _ in 0..count {
            rest = &rest[if rest[0] == PROCESSOR { 20 } else { 8 }..];
        }
        assert!(rest.is_empty());
    }
}
