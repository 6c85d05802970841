//! Device models of a forkvm machine.
//!
//! A device here is what a guest sees of it, its state, and nothing else: it knows no KVM and no
//! clone. It is handed guest memory, an [`InterruptLine`] to pulse and, for a disk, a
//! [`block::BlockLayer`]; it answers accesses on a [`Bus`] and says by an [`Effect`] what the
//! access means to the vCPU that made it. `forkvm-vmm` puts devices on buses and runs them.
//!
//! Every access is served by the vCPU thread that makes it, and a request is taken from its queue only
//! to be answered at once. So when nobody is inside of a device nothing is in flight: once the vCPUs are
//! paused and, for a device that is fed from outside of the guest (vsock, console), its feeder has
//! ended the stretch of work that it announces to the [`Brake`].

pub mod block;
pub mod brake;
pub mod bus;
pub mod device;
pub mod doorbell;
pub mod exit;
pub mod section;
pub mod serial;
pub mod virtio;

pub use brake::Brake;
pub use bus::Bus;
pub use device::{Device, DeviceError, Effect, InterruptLine};
pub use doorbell::Doorbell;
pub use exit::ExitDevice;
pub use section::{SavedState, Section, SectionError, Sections};
pub use serial::Serial;

/// Guest memory as the devices see it.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;
