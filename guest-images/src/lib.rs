//! The guests that forkvm carries inside its binary, so that it runs without a download.
//!
//! Holds bytes and names only; `forkvm-vmm` boots them. The sources of [`BARE`] are in `bare/`, those of [`AGENT`] in `agent/`, and
//! `build.rs` builds them with this crate.

mod jobs;

pub use jobs::{JOBS, Job};

/// The freestanding guest: a static x86-64 ELF. It has the 64-bit entry of the Linux boot protocol
/// (RSI = `boot_params`) and the 32-bit one of PVH (by its note). `job=NAME key=value…` on the
/// command line says what it does; [`JOBS`] lists the names.
pub const BARE: &[u8] = include_bytes!(env!("FORKVM_BARE_ELF"));

/// The agent of Linux guests: a static x86-64 program for any Linux. As PID 1 it is a machine's init; called as `forkvm-guest`
/// it is what programs inside use.
pub const AGENT: &[u8] = include_bytes!(env!("FORKVM_AGENT"));
