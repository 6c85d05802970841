//! Fixed places of the virtio-mmio devices.
//!
//! A device of slot `i` has its registers at [`base`]`(i)` and its interrupt at [`gsi`]`(i)`.
//! Nothing is allocated at run time, so a restored machine has nothing to replay, and a guest
//! without ACPI knows where to look. An empty slot has no device, so it reads as all ones, like
//! every address that nothing decodes: a guest looks for the magic value first.

/// Registers of slot 0 (guest-physical).
pub const MMIO_BASE: u64 = 0xd000_0000;

/// Distance between two slots, and the size of each.
pub const MMIO_STRIDE: u64 = 0x1000;

/// Interrupt line of slot 0.
pub const FIRST_GSI: u32 = 5;

/// First of the disk slots: disk `i` of a machine is in slot `DISK0 + i`.
pub const DISK0: u32 = 0;

/// Number of disk slots.
pub const DISKS: u32 = 8;

/// Slot of the entropy device.
pub const RNG: u32 = 8;

/// Slot of the socket device.
pub const VSOCK: u32 = 9;

/// Slot of the virtio console.
pub const CONSOLE: u32 = 10;

/// Number of slots, empty ones included. Slots 11 and 12 wait for net and balloon.
pub const COUNT: u32 = 13;

/// Interrupt line of the fork doorbell: the first one after the slots.
pub const DOORBELL_GSI: u32 = FIRST_GSI + COUNT;

/// Guest-physical address of the registers of slot `index`.
pub const fn base(index: u32) -> u64 {
    MMIO_BASE + index as u64 * MMIO_STRIDE
}

/// Interrupt line of slot `index`.
pub const fn gsi(index: u32) -> u32 {
    FIRST_GSI + index
}
