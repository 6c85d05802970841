//! Machines that are saved and started again, through the library.
//!
//! No test here starts a program: between fork and exec it would hold the locks of disks.

#[path = "../common/mod.rs"]
mod common;

mod disks;
mod home;
mod lazy;
mod memory;
