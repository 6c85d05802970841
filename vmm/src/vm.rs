//! A VM and its life: shell, ready, running, paused.

use std::io;
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

use forkvm_devices::device::GuestCall;
use forkvm_devices::doorbell::Doorbell;
use forkvm_devices::{DeviceError, SectionError};
use thiserror::Error;

use crate::boot::BootError;
use crate::gate::PauseError;
use crate::machine::{Disk, Machine, MachineError, VmConfig, lock};
use crate::memory::{MemoryError, Ram};
use crate::software_kvm::FallbackCounts;
use crate::vcpu::{RunError, StateError};

mod objects;
pub(crate) mod probe_guest;
mod rewind;
mod runner;
mod shell;
mod state;
mod stats;
mod summary;
mod translation_probe;

use objects::KvmObjects;
pub use shell::Shell;
pub use state::{HostError, MachineState};
pub use stats::{KvmStats, StatsError};
pub use summary::{MachineSummary, VcpuSummary};
pub(crate) use translation_probe::sees_rewritten_tables;

/// What a VM tells its owner. Called from vCPU threads: must not block, nor call back into the VM.
pub type EventSink = Arc<dyn Fn(VmEvent) + Send + Sync>;

/// Something that a VM did and its owner may care for.
#[derive(Debug)]
pub enum VmEvent {
    /// The first KVM_RUN is about to be entered. Sent once.
    Running {
        /// When.
        at: Instant,
    },
    /// A vCPU made a call and is held until [`Vm::release`].
    Call {
        /// The vCPU.
        vcpu: u32,
        /// What it asks.
        call: GuestCall,
        /// When the exit was seen.
        at: Instant,
    },
    /// The guest told something.
    Report {
        /// One of `forkvm_abi::doorbell::report`, or the guest's own.
        value: u32,
        /// When the exit was seen.
        at: Instant,
    },
    /// The machine has ended. The vCPU that says so runs no more, the others do until the VM is
    /// dropped; each of them may say so too, and the first one counts.
    Ended(EndReason),
}

/// How a machine ended.
#[derive(Debug)]
pub enum EndReason {
    /// Through the exit device, with this status.
    Exit(u32),
    /// Reset by the guest (a machine is not started again).
    Reset,
    /// Powered off by the guest.
    PowerOff,
    /// A triple fault of the guest.
    TripleFault {
        /// The vCPU.
        vcpu: u32,
    },
    /// A vCPU could not go on.
    Failed(RunError),
}

/// A VM whose state is in place and that has not run yet.
pub struct ReadyVm {
    inner: Inner,
    events: EventSink,
}

/// A running VM. Dropping it ends it: the vCPU threads are stopped and joined, then the vCPUs, the
/// VM and the memory go, in this order.
pub struct Vm {
    inner: Inner,
}

/// A VM that stands still: all vCPUs are at the barrier with their last instruction finished.
/// Dropping it lets the VM run on, unless its owner [holds](PausedVm::hold) it.
pub struct PausedVm<'a> {
    inner: &'a mut Inner,
    stays: bool,
}

/// What all of them hold. Dropped in this order, once the threads have ended.
struct Inner {
    config: VmConfig,
    machine: Machine,
    objects: KvmObjects,
    /// Its owner holds it: it stands from one pause to the next, whatever those are for.
    held: bool,
}

impl ReadyVm {
    /// The fork doorbell: to tell the guest who it is and to answer calls that were pending.
    pub fn doorbell(&self) -> MutexGuard<'_, Doorbell> {
        lock(&self.inner.machine.doorbell)
    }

    /// What the machine is.
    pub fn config(&self) -> &VmConfig {
        &self.inner.config
    }

    /// Lets it run. Its devices look into their queues once, on a vCPU's thread: a guest could make
    /// that last, and there a pause or an end can stop it.
    pub fn start(self) -> Vm {
        self.inner.open();
        self.begin()
    }

    /// The same, but it is [held](PausedVm::hold): it takes its first step when it is
    /// [let go](Vm::let_go).
    pub fn start_held(mut self) -> Vm {
        self.inner.held = true;
        self.begin()
    }

    fn begin(mut self) -> Vm {
        let Inner {
            machine, objects, ..
        } = &mut self.inner;
        objects.brake.leave_over();
        objects.start_threads(machine, &self.events);
        Vm { inner: self.inner }
    }
}

impl Vm {
    /// How often each instruction was carried out for a software KVM in this VM; `None` where KVM needs
    /// no such help, or the machine was started without a kernel.
    pub fn fallback_counts(&self) -> Option<FallbackCounts> {
        let counts = self.inner.objects.fallbacks.as_ref()?;
        Some(lock(counts).clone())
    }

    /// Whether it is [held](PausedVm::hold).
    pub fn is_held(&self) -> bool {
        self.inner.held
    }

    /// Lets a VM that is [held](PausedVm::hold) run on. Nothing happens to one that is not.
    pub fn let_go(&mut self) {
        if std::mem::take(&mut self.inner.held) {
            self.inner.run_on();
        }
    }

    /// Brings all vCPUs to the barrier. On an error the VM runs on, unless it is held.
    pub fn pause(&mut self, deadline: Duration) -> Result<PausedVm<'_>, PauseError> {
        let objects = &self.inner.objects;
        objects.brake.pull();
        let until = Instant::now() + deadline;
        let stood = objects
            .gate
            .close(deadline, |vcpu| objects.kick(vcpu))
            .and_then(|()| {
                let left = until.saturating_duration_since(Instant::now());
                Ok(objects.brake.until_still(left)?)
            });
        if let Err(error) = stood {
            if !self.inner.held {
                self.inner.open();
            }
            return Err(error);
        }
        Ok(PausedVm {
            inner: &mut self.inner,
            stays: false,
        })
    }

    /// Lets the vCPU of an answered call go on. The answer itself goes to [`Vm::doorbell`] first.
    pub fn release(&self, vcpu: u32) {
        self.inner.objects.gate.release(vcpu);
    }

    /// Its end is decided, and pages that it misses may be made up to let its threads out: its
    /// devices do nothing any more, and no vCPU comes back to guest code.
    pub fn condemn(&self) {
        self.inner.objects.brake.condemn();
        self.inner.objects.kick_to_end();
    }

    /// The fork doorbell.
    pub fn doorbell(&self) -> MutexGuard<'_, Doorbell> {
        lock(&self.inner.machine.doorbell)
    }

    /// The disks, in the order of the configuration.
    pub fn disks(&self) -> &[Disk] {
        &self.inner.machine.disks
    }

    /// Sends bytes to the guest's virtio console, or to the serial one if it has no other; returns how many
    /// there is room for.
    pub fn console_input(&self, bytes: &[u8]) -> usize {
        self.inner.machine.consoles.enqueue(bytes)
    }

    /// What the machine is.
    pub fn config(&self) -> &VmConfig {
        &self.inner.config
    }

    /// Its memory.
    pub fn ram(&self) -> &Ram {
        &self.inner.objects.ram
    }

    /// What KVM counts of it. The VM runs on meanwhile.
    pub fn kvm_stats(&self) -> Result<KvmStats, StatsError> {
        KvmStats::read(&self.inner.objects.vm)
    }
}

impl PausedVm<'_> {
    /// Reads the whole state but memory.
    pub fn save(&self) -> Result<MachineState, VmError> {
        self.inner.save()
    }

    /// Its memory.
    pub fn ram(&self) -> &Ram {
        &self.inner.objects.ram
    }

    /// Its memory, to map it anew in place.
    pub fn ram_mut(&mut self) -> &mut Ram {
        &mut self.inner.objects.ram
    }

    /// The disks, in the order of the configuration; between two pauses nothing is in flight.
    pub fn disks(&self) -> &[Disk] {
        &self.inner.machine.disks
    }

    /// The fork doorbell.
    pub fn doorbell(&self) -> MutexGuard<'_, Doorbell> {
        lock(&self.inner.machine.doorbell)
    }

    /// Whether the guest has ended its machine, which its owner is just being told: there is nothing
    /// to go on with.
    pub fn has_ended(&self) -> bool {
        self.inner.objects.gate.has_ended()
    }

    /// Whether its end is decided because pages of its memory cannot be had: what they hold is not to
    /// be relied on.
    pub fn is_condemned(&self) -> bool {
        self.inner.objects.brake.condemned()
    }

    /// What the machine is.
    pub fn config(&self) -> &VmConfig {
        &self.inner.config
    }

    /// One edge on the interrupt line `gsi`, as a device would raise it.
    pub fn pulse(&self, gsi: u32) -> Result<(), VmError> {
        let line = |level| {
            self.inner
                .objects
                .vm
                .set_irq_line(gsi, level)
                .map_err(call("KVM_IRQ_LINE"))
        };
        line(true)?;
        line(false)
    }

    /// Lets the VM run on, which dropping does as well: unless it is held.
    pub fn resume(self) {}

    /// Ends the borrow, and holds the VM: it stands until it is [let go](Vm::let_go), also when it is paused
    /// for something else meanwhile.
    pub fn hold(self) {
        self.inner.held = true;
    }

    /// Ends the borrow but not the pause: the VM stands until it is paused again, which then takes
    /// no time, and resumed.
    pub fn stay(mut self) {
        self.stays = true;
    }
}

impl Drop for PausedVm<'_> {
    fn drop(&mut self) {
        if !self.stays && !self.inner.held {
            self.inner.run_on();
        }
    }
}

impl Inner {
    /// After a pause.
    fn run_on(&self) {
        for vcpu in &self.objects.vcpus {
            if let Err(error) = lock(vcpu).note_pause() {
                tracing::warn!(%error, "KVM_KVMCLOCK_CTRL failed; a guest watchdog may bark");
            }
        }
        self.open();
    }

    fn open(&self) {
        // In this order: a vCPU that passes the gate looks at what the brake left over.
        self.objects.brake.release();
        self.objects.gate.open();
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // While there is memory that the thread may be looking at, and nothing new that it begins.
        self.objects.brake.pull();
        if let Some(vsock) = &mut self.machine.vsock {
            vsock.end();
        }
        // Before the devices go that they serve.
        self.objects.end();
    }
}

pub(crate) fn call(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> VmError {
    move |error| VmError::Call {
        call,
        source: error.into(),
    }
}

/// Why a VM could not be built, booted, saved or restored.
#[derive(Debug, Error)]
pub enum VmError {
    /// A call to the kernel failed.
    #[error("{call} failed{}", mend(.source))]
    Call {
        /// The call.
        call: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The configuration is impossible.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// No addresses for its memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The payload cannot be booted.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A vCPU's or the VM's registers.
    #[error("vCPU or VM state")]
    State(#[from] StateError),
    /// A device's state.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A section of the state.
    #[error(transparent)]
    Section(#[from] SectionError),
    /// A vCPU did not come back from its first entry as one without memory does.
    #[error("a vCPU of a shell cannot be warmed up")]
    Run(#[source] RunError),
    /// A shell cannot be primed.
    #[error("a shell cannot be warmed up: it has {what}; this is a bug in forkvm")]
    NotWarmed {
        /// What is in the way.
        what: String,
    },
    /// The state comes from another kind of host.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The guest that tells how this KVM translates did not do what it should.
    #[error("asking a guest whether this KVM shadows page tables failed: {what}")]
    Probe {
        /// What was seen.
        what: String,
    },
    /// The shell is not of the shape that the state needs.
    #[error("the saved machine has {what} and this one was built otherwise")]
    Shape {
        /// What differs.
        what: String,
    },
}

fn mend(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EMFILE | libc::ENFILE) => ": too few file descriptors, raise `ulimit -n`",
        Some(libc::ENOMEM) => ": the host has too little memory for another VM",
        Some(libc::EAGAIN) => ": the host allows no more threads, see `ulimit -u`",
        _ => "",
    }
}
