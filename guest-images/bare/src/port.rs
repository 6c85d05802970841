//! Port I/O, from ring 3: the I/O bitmap and IOPL 3 allow every port.

#![allow(unsafe_code)] // `in` and `out`.

use core::arch::asm;

/// Reads a byte from `port`.
pub fn read8(port: u16) -> u8 {
    let value;
    // SAFETY: the devices of this machine touch memory only where a driver told them to.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nostack)) };
    value
}

/// Writes a byte to `port`.
pub fn write8(port: u16, value: u8) {
    // SAFETY: as for `read8`.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nostack)) };
}

/// Reads 32 bits from `port`.
pub fn read32(port: u16) -> u32 {
    let value;
    // SAFETY: as for `read8`.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nostack)) };
    value
}

/// Writes 32 bits to `port`.
pub fn write32(port: u16, value: u32) {
    // SAFETY: as for `read8`.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack)) };
}
