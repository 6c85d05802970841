//! Linux machines on KVM: what their users, their agents and their clones rely on.
//!
//! All of them come from one template: a machine that was booted once, saved when its agent answered, and is
//! restored here for each test (`template.rs`).

#[path = "../common/mod.rs"]
mod common;
#[path = "../command/harness.rs"]
#[expect(dead_code, reason = "tests of the bare guest use the rest")]
mod harness;

mod commands;
mod console;
mod disks;
mod exec;
mod ext4;
mod forks;
mod identities;
mod machine;
mod software_kvm;
mod template;
mod templates;
