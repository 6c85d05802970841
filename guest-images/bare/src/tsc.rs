//! The time-stamp counter: bounds for waits, not a clock.

#![allow(unsafe_code)] // An instruction.

use core::arch::x86_64::_rdtsc;

/// Cycles of the TSC. A fork may make it jump.
pub fn cycles() -> u64 {
    // SAFETY: RDTSC touches nothing, and CR4.TSD is off.
    unsafe { _rdtsc() }
}
