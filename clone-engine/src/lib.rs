//! fork() for virtual machines: the engine.
//!
//! A running VM is a [`Member`] of a [`Family`]: a `forkvm_vmm::Vm` and the thread that serves it.
//! A fork ([`fork`]) pauses the parent, saves its state, lets a `freeze::Freeze` turn its memory
//! into an immutable [`image::MemoryImage`] and its disks into read-only bases, and lets the parent
//! run on. What it leaves is a [`ForkPoint`]; a [`spawn::Spawner`] makes clones from it, now or
//! later. Everything that happens on the way is a [`Phase`], and a phase that fails is rolled back.
//!
//! Clones live in this process, or in workers ([`worker`]) that a fork point is handed to.
//!
//! Where a clone's first instruction comes from: [`spawn::in_process`] maps the image privately,
//! restores the state and writes the clone's own answer into its doorbell page; the vCPU goes on
//! behind the `out` instruction with which the parent asked, or wherever it was paused.

pub mod accounting;
mod attached;
mod boot;
mod descriptor;
mod disks;
mod end;
mod family;
pub mod fault;
mod first_pages;
pub mod fork;
mod fork_point;
pub mod freeze;
mod handed_out;
mod identity;
pub mod image;
pub mod limits;
mod member;
mod page_link;
mod parked;
mod phase;
mod pool;
mod rewind;
pub mod saved;
pub mod source;
pub mod spawn;
mod timeline;
mod userfault;
mod vm_memory;
mod vsock;
mod wire;
pub mod worker;
mod working_set;

pub use boot::{BootSpec, ConsoleDevice, DiskSpec, StartError};
pub use descriptor::DescriptorError;
pub use disks::{DiskSource, DisksError};
pub use end::End;
pub use family::{Consoles, Ending, Family, FamilyConfig, NoConsoles};
pub use fault::{FaultConfig, FaultFigures};
pub use fork::{CloneSpec, ForkError, MemoryMode, Ticket, UnknownMemoryMode};
pub use fork_point::ForkPoint;
pub use freeze::FreezeKind;
pub use identity::Identity;
pub use member::{Finished, HoldError, Member, MemberError};
pub use phase::{ForkLog, NoObserver, Observer, Phase, Vetoed};
pub use pool::{Pool, PoolConfig, PoolError};
pub use rewind::{Break, RewindError, RewindWay, UnknownRewindWay};
pub use timeline::Timeline;
pub use userfault::{UserfaultError, check_userfaultfd};
pub use vsock::VsockSpec;
pub use working_set::{WorkingSet, WorkingSetPolicy};
