//! What the VMM or the firmware tells the guest: its command line and its RAM.
//!
//! Read once, at the start, into memory of the guest's own: where it lies is RAM like any other
//! afterwards.

#![allow(unsafe_code)] // Structures at addresses that the boot protocol hands over.

use core::ptr::{self, with_exposed_provenance};

/// How the first vCPU was entered.
#[derive(Clone, Copy)]
pub enum BootProtocol {
    /// The Linux 64-bit boot protocol: a `boot_params` (Documentation/arch/x86/boot.rst).
    Linux,
    /// Xen's PVH protocol: an `hvm_start_info` (xen/include/public/arch-x86/hvm/start_info.h).
    Pvh,
}

/// Type of usable RAM, in the maps of both protocols.
const RAM: u32 = 1;

/// Offsets in `boot_params`.
mod zero_page {
    pub(super) const E820_COUNT: u64 = 0x1e8;
    pub(super) const CMD_LINE_PTR: u64 = 0x228;
    pub(super) const E820_TABLE: u64 = 0x2d0;
    pub(super) const E820_STRIDE: u64 = 20;
}

/// Offsets in `hvm_start_info`.
mod start_info {
    pub(super) const CMDLINE_PADDR: u64 = 24;
    pub(super) const MEMMAP_PADDR: u64 = 40;
    pub(super) const MEMMAP_ENTRIES: u64 = 48;
    pub(super) const MEMMAP_STRIDE: u64 = 24;
}

/// Most regions that are kept. A forkvm machine has three.
const REGIONS: usize = 16;
/// Longest command line that is kept; Linux's limit on x86.
const COMMAND_LINE: usize = 2048;

/// What the guest was told at its boot.
pub struct BootInfo {
    ram: [(u64, u64); REGIONS],
    regions: usize,
    command_line: [u8; COMMAND_LINE],
    command_line_len: usize,
}

impl BootInfo {
    /// Ranges of RAM as (start, end), in the order of the map.
    pub fn ram(&self) -> &[(u64, u64)] {
        &self.ram[..self.regions]
    }

    /// The command line; the empty one when it is not UTF-8.
    pub fn command_line(&self) -> &str {
        core::str::from_utf8(&self.command_line[..self.command_line_len]).unwrap_or_default()
    }

    /// RAM of the machine in MiB, rounded up: firmware keeps a few KiB.
    pub fn ram_mib(&self) -> u64 {
        self.ram()
            .iter()
            .map(|(start, end)| end - start)
            .sum::<u64>()
            .div_ceil(1 << 20)
    }

    fn add_ram(&mut self, start: u64, len: u64) {
        if self.regions < REGIONS {
            self.ram[self.regions] = (start, start.saturating_add(len));
            self.regions += 1;
        }
    }

    fn copy_command_line(&mut self, address: u64) {
        if address == 0 {
            return;
        }
        while self.command_line_len < COMMAND_LINE {
            match field::<u8>(address + self.command_line_len as u64) {
                0 => break,
                byte => self.command_line[self.command_line_len] = byte,
            }
            self.command_line_len += 1;
        }
    }
}

/// Reads what `protocol` left at the physical address `info`.
pub fn read(info: u64, protocol: BootProtocol) -> BootInfo {
    let mut boot = BootInfo {
        ram: [(0, 0); REGIONS],
        regions: 0,
        command_line: [0; COMMAND_LINE],
        command_line_len: 0,
    };
    let (command_line, map, entries, stride) = match protocol {
        BootProtocol::Linux => (
            u64::from(field::<u32>(info + zero_page::CMD_LINE_PTR)),
            info + zero_page::E820_TABLE,
            u32::from(field::<u8>(info + zero_page::E820_COUNT)),
            zero_page::E820_STRIDE,
        ),
        BootProtocol::Pvh => (
            field::<u64>(info + start_info::CMDLINE_PADDR),
            field::<u64>(info + start_info::MEMMAP_PADDR),
            field::<u32>(info + start_info::MEMMAP_ENTRIES),
            start_info::MEMMAP_STRIDE,
        ),
    };
    // Entries of both maps begin with start (u64), length (u64), type (u32).
    for entry in (0..u64::from(entries)).map(|index| map + index * stride) {
        if field::<u32>(entry + 16) == RAM {
            boot.add_ram(field::<u64>(entry), field::<u64>(entry + 8));
        }
    }
    boot.copy_command_line(command_line);
    boot
}

/// The `T` (an integer) at the physical address `address`.
fn field<T: Copy>(address: u64) -> T {
    // SAFETY: the low 4 GiB are mapped, the boot protocol put integers there, and nothing writes
    // them meanwhile. The addresses are not aligned in every case.
    unsafe { ptr::read_unaligned(with_exposed_provenance(address as usize)) }
}
