//! I/O ports of 32 bits from user space.
//!
//! The kernel lets a thread use ports by its I/O bitmap, which `ioperm` fills; nobody else does.

#![allow(unsafe_code)] // Port instructions, and the call that permits them.

use std::arch::asm;
use std::io;

/// Lets the calling thread, and no other, use `count` ports from `first` on.
///
/// # Errors
/// The kernel's: it wants CAP_SYS_RAWIO and CONFIG_X86_IOPL_IOPERM.
pub(super) fn allow(first: u16, count: u16) -> io::Result<()> {
    // SAFETY: changes the I/O permissions of this thread and touches no memory.
    match unsafe { libc::ioperm(first.into(), count.into(), 1) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Reads a port that this thread was allowed; of another the process dies by SIGSEGV.
pub(super) fn read32(port: u16) -> u32 {
    let value;
    // SAFETY: a port read changes EAX only; it is never memory of this process that a device answers with.
    unsafe { asm!("in eax, dx", out("eax") value, in("dx") port, options(nomem, nostack)) };
    value
}

/// Writes a port that this thread was allowed.
pub(super) fn write32(port: u16, value: u32) {
    // SAFETY: no register changes. The host writes the doorbell page meanwhile, so memory counts as
    // changed (no `nomem`); the page is read by volatile accesses only.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack)) };
}
