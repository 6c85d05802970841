//! What a forkvm guest and its host agree on.
//!
//! Shared by the host (devices, vmm) and by everything that runs inside a guest, so that a number
//! that crosses the boundary is written down once. It holds constants and `repr(C)` layouts only:
//! no behaviour, no allocation, no dependency. Addresses are guest-physical; all integers are
//! little-endian.
#![no_std]
#![forbid(unsafe_code)]

pub mod doorbell;
pub mod records;
pub mod slot;

/// I/O port of the first 16550 UART (`COM1`); its interrupt is [`SERIAL_GSI`].
pub const SERIAL_PORT: u16 = 0x3f8;

/// Number of I/O ports that the UART decodes.
pub const SERIAL_PORT_LEN: u16 = 8;

/// Interrupt line of the UART, as on a PC.
pub const SERIAL_GSI: u32 = 4;

/// Interrupt line that no device has: a test raises it by hand to see an interrupt arrive.
pub const TEST_GSI: u32 = 23;

/// I/O port of the exit device. A 32-bit write ends the whole machine with that value as its exit
/// status; QEMU's `isa-debug-exit` at this port ends QEMU likewise.
pub const EXIT_PORT: u16 = 0xf4;

/// Number of I/O ports that the exit device decodes.
pub const EXIT_PORT_LEN: u16 = 4;

/// Most vCPUs that a machine can have.
pub const MAX_VCPUS: u32 = 16;

/// First guest-physical address that is never low RAM: RAM beyond this size continues at
/// [`HIGH_RAM_START`]. Devices live in between.
pub const LOW_RAM_END: u64 = 0xc000_0000;

/// Guest-physical address of the RAM that did not fit below [`LOW_RAM_END`].
pub const HIGH_RAM_START: u64 = 0x1_0000_0000;

/// Negative error numbers that the host answers with; the values are Linux's.
pub mod errno {
    /// The call is not known to this host.
    pub const ENOSYS: i64 = 38;
    /// Try again: in a clone, the call of a vCPU that was not the one that forked.
    pub const EAGAIN: i64 = 11;
    /// Not one clone would fit into the host's memory.
    pub const ENOMEM: i64 = 12;
    /// The host is at a limit that is not memory (file descriptors, threads, clones).
    pub const ENOSPC: i64 = 28;
    /// The host cannot serve the call now.
    pub const EBUSY: i64 = 16;
    /// An argument is out of its range.
    pub const EINVAL: i64 = 22;
    /// The host tried and failed; its log says why.
    pub const EIO: i64 = 5;
}
