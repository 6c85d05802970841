//! fork() for virtual machines.
//!
//! Boot a VM, bring it into the state you want, [`Vm::fork`] it: every clone continues from that
//! very instant, with memory and disks copy-on-write. A guest can ask for the same from inside,
//! through the fork doorbell ([`abi`]).
//!
//! ```no_run
//! use std::time::Duration;
//! use forkvm::{BootSpec, CloneSpec, ConsoleDevice, Vm, guest};
//!
//! let spec = BootSpec {
//!     name: "parent".into(),
//!     memory_mib: 512,
//!     vcpus: 1,
//!     disks: Vec::new(),
//!     payload: guest::bare(),
//!     cmdline: "job=touch mib=16".into(),
//!     console: ConsoleDevice::Serial,
//! };
//! let parent = Vm::boot(spec)?;
//! parent.wait_ready(Duration::from_secs(10))?;
//! for clone in parent.fork(CloneSpec::new(4))? {
//!     println!("clone {} {}", clone.id(), clone.join().end);
//! }
//! # Ok::<(), forkvm::Error>(())
//! ```
//!
//! Clones live in this process, or in workers, processes of their own ([`Process`], [`worker`]).
//!
//! The layers below are crates of their own: `forkvm-devices` (device models), `forkvm-vmm` (KVM
//! machines), `forkvm-clone-engine` (freeze, images, spawning).

pub mod agent;
#[cfg(feature = "cli")]
pub mod bench;
#[cfg(feature = "cli")]
pub mod demo;
#[cfg(feature = "cli")]
pub mod demo_linux;
pub mod guest;
#[cfg(feature = "cli")]
pub mod host;
pub mod linux;
#[cfg(feature = "cli")]
pub mod packaged;
#[cfg(feature = "cli")]
pub mod percentiles;
#[cfg(feature = "cli")]
pub mod templates;
mod vm;

pub use forkvm_abi as abi;
pub use forkvm_clone_engine as engine;
pub use forkvm_clone_engine::spawn::process::{Process, ProcessConfig, WorkerProgram};
pub use forkvm_clone_engine::worker;
pub use forkvm_clone_engine::{
    BootSpec, CloneSpec, ConsoleDevice, DiskSource, DiskSpec, End, FamilyConfig, FaultConfig,
    Finished, ForkPoint, FreezeKind, Identity, MemoryMode, RewindWay, Timeline, VsockSpec,
};
pub use forkvm_devices as devices;
pub use forkvm_vmm as vmm;
pub use forkvm_vmm::boot::Payload;
pub use vm::{CloneVm, Error, Vm};
