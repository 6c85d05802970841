//! The guests that forkvm carries inside its binary, so that it runs without a download.
//!
//! Holds bytes and names only; `forkvm-vmm` boots them. The sources of [`BARE`] are in `bare/`, and
//! `build.rs` builds them with this crate.

/// The freestanding guest: a static x86-64 ELF. It has the 64-bit entry of the Linux boot protocol
/// (RSI = `boot_params`) and the 32-bit one of PVH (by its note). `job=NAME key=value…` on the
/// command line says what it does; [`JOBS`] lists the names.
pub const BARE: &[u8] = include_bytes!(env!("FORKVM_BARE_ELF"));

/// A job of [`BARE`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Job {
    /// What `job=` takes.
    pub name: &'static str,
    /// What it does, in a line.
    pub about: &'static str,
    /// The arguments that it takes besides, as `key=default`.
    pub arguments: &'static str,
}

/// Every job of [`BARE`].
pub const JOBS: &[Job] = &[Job {
    name: "hello",
    about: "prints the number of vCPUs and the RAM, and ends",
    arguments: "",
}];
