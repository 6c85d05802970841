//! KVM machines of forkvm: one VM, its vCPU threads, its devices, and its state.
//!
//! A machine's life is a chain of types. [`Shell::build`] makes the KVM objects, in the one order
//! that is fast and right, with vCPU threads that wait. [`Shell::boot`] or [`Shell::restore`] puts
//! devices and a state in and gives a [`ReadyVm`]; [`ReadyVm::start`] lets it run as a [`Vm`]. Only a
//! [`PausedVm`], from [`Vm::pause`], can be [saved](PausedVm::save); dropping it lets the VM run on.
//!
//! This crate knows no clones: `forkvm-clone-engine` forks what is here.
//!
//! Unsafe code is denied but in the modules that cross into the kernel, each with its reason.

pub mod boot;
mod cpuid;
mod gate;
pub mod kvm;
mod machine;
pub mod memory;
pub mod memory_file;
pub mod saved_machine;
mod software_kvm;
pub mod state_file;
mod tsc;
mod vcpu;
mod vm;
mod vsock;

pub use gate::PauseError;
pub use kvm::{Kvm, KvmError, KvmFlavour};
pub use machine::{Disk, DiskConfig, MachineError, Peripherals, VmConfig};
pub use memory::{Backing, MemoryError, MemoryLayout, Ram, RamRegion};
pub use software_kvm::{FallbackCounts, Promises, SoftwareKvmError};
pub use vcpu::kick;
pub use vcpu::{RunError, StateError};
pub use vm::{
    EndReason, EventSink, HostError, KvmStats, MachineState, MachineSummary, PausedVm, ReadyVm,
    Shell, StatsError, VcpuSummary, Vm, VmError, VmEvent,
};
pub use vsock::VsockHost;
