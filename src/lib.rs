//! fork() for virtual machines.

#[cfg(feature = "cli")]
pub mod demo;
