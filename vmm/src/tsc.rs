//! The host's time-stamp counter.
#![allow(unsafe_code)] // One instruction.

/// Reads the host's TSC.
pub(crate) fn host_tsc() -> u64 {
    // SAFETY: RDTSC exists on every x86-64 and is not disabled for user space on Linux by default;
    // where it is (prctl PR_SET_TSC), the process asked for the SIGSEGV.
    unsafe { core::arch::x86_64::_rdtsc() }
}
