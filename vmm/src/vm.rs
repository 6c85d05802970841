//! A VM and its life: shell, ready, running, paused.
#![allow(unsafe_code)] // KVM_SET_USER_MEMORY_REGION takes host addresses.

use std::ffi::c_ulong;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use forkvm_devices::device::GuestCall;
use forkvm_devices::doorbell::Doorbell;
use forkvm_devices::section::SectionsReader;
use forkvm_devices::{Brake, DeviceError, Effect, Section, SectionError, Sections};
use kvm_bindings::{
    KVM_CAP_ENFORCE_PV_FEATURE_CPUID, KVM_CAP_X86_TRIPLE_FAULT_EVENT, kvm_enable_cap,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use thiserror::Error;

use crate::boot::{self, BootError, Payload};
use crate::cpuid;
use crate::gate::{Gate, Passage, PauseError};
use crate::kvm::Kvm;
use crate::machine::{Devices, Disk, Machine, MachineError, Peripherals, VmConfig, lock};
use crate::memory::Ram;
use crate::vcpu::{
    Abilities, Clock, Kick, RunError, StateError, Stop, Vcpu, VcpuState, allow_kicks,
    prepare_signal,
};

mod state;
mod stats;
mod summary;

pub use state::HostError;
pub use stats::{KvmStats, StatsError};
pub use summary::{MachineSummary, VcpuSummary};

/// Three pages that real-mode emulation on Intel needs, out of the way of RAM and devices
/// (KVM_SET_TSS_ADDR, KVM API 4.36).
const TSS_ADDRESS: usize = 0xfffb_d000;
/// One page for the same purpose (KVM_SET_IDENTITY_MAP_ADDR, KVM API 4.40).
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

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

/// A VM with vCPUs, devices and memory, but without a state. Its threads wait.
pub struct Shell {
    inner: Inner,
}

/// A VM whose state is in place and that has not run yet.
pub struct ReadyVm {
    inner: Inner,
}

/// A running VM. Dropping it ends it: the vCPU threads are stopped and joined, then the vCPUs, the
/// VM and the memory go, in this order.
pub struct Vm {
    inner: Inner,
}

/// A VM that stands still: all vCPUs are at the barrier with their last instruction finished.
/// Dropping it lets the VM run on.
pub struct PausedVm<'a> {
    inner: &'a mut Inner,
    stays: bool,
}

/// What all of them hold.
struct Inner {
    config: VmConfig,
    kvm: Arc<Kvm>,
    threads: Vec<VcpuThread>,
    gate: Arc<Gate>,
    vcpus: Vec<Arc<Mutex<Vcpu>>>,
    machine: Machine,
    vm: Arc<VmFd>,
    // After everything that reaches it: fields are dropped in this order.
    ram: Ram,
    has_run: Arc<AtomicBool>,
}

struct VcpuThread {
    join: Option<JoinHandle<()>>,
    kick: Kick,
}

impl Shell {
    /// Builds the KVM objects. The order is the point of this function, see the comments.
    ///
    /// `events` hears of calls, reports and the end. `ram` must have the layout that
    /// [`VmConfig::memory_mib`] asks for.
    pub fn build(
        kvm: &Arc<Kvm>,
        config: VmConfig,
        ram: Ram,
        peripherals: Peripherals,
        events: EventSink,
    ) -> Result<Shell, VmError> {
        config.check()?;
        prepare_signal().map_err(|source| VmError::Call {
            call: "sigaction",
            source,
        })?;
        let vm = Arc::new(create_vm(kvm)?);
        // Before any vCPU: Intel needs these pages for real mode.
        vm.set_tss_address(TSS_ADDRESS)
            .map_err(call("KVM_SET_TSS_ADDR"))?;
        vm.set_identity_map_address(IDENTITY_MAP_ADDRESS)
            .map_err(call("KVM_SET_IDENTITY_MAP_ADDR"))?;
        let abilities = abilities(&vm)?;
        // Memory before the irqchip: the other way round costs 7 ms more (host-facts, section 3),
        // since the irqchip's private slots make KVM rebuild what it knows of memory.
        for (slot, (region, address)) in ram.host_ranges().enumerate() {
            let region = kvm_userspace_memory_region {
                slot: slot as u32,
                flags: 0,
                guest_phys_addr: region.start,
                memory_size: region.len,
                userspace_addr: address as u64,
            };
            // SAFETY: the range is mapped by `ram`, which is dropped after the VM.
            unsafe { vm.set_user_memory_region(region) }
                .map_err(call("KVM_SET_USER_MEMORY_REGION"))?;
        }
        // Before the vCPUs, which get their LAPICs from it. No PIT: it makes the VM's end 20 ms
        // slower, and guests here keep time by kvmclock and the LAPIC.
        vm.create_irq_chip().map_err(call("KVM_CREATE_IRQCHIP"))?;
        let machine = Machine::build(&vm, &config, ram.guest(), peripherals)?;
        let mut vcpus = Vec::new();
        for index in 0..config.vcpus {
            let fd = vm
                .create_vcpu(u64::from(index))
                .map_err(call("KVM_CREATE_VCPU"))?;
            enforce_pv_features(&vm, &fd)?;
            let (pio, mmio) = (machine.pio.clone(), machine.mmio.clone());
            let vcpu = Vcpu::new(fd, index, kvm.clone(), abilities, pio, mmio);
            vcpus.push(Arc::new(Mutex::new(vcpu)));
        }
        let mut inner = Inner {
            gate: Arc::new(Gate::new(config.vcpus)),
            config,
            kvm: kvm.clone(),
            threads: Vec::new(),
            vcpus,
            machine,
            vm,
            ram,
            has_run: Arc::default(),
        };
        inner.start_threads(&events)?;
        Ok(Shell { inner })
    }

    /// Puts a payload and a command line into memory and the first vCPU at its entry.
    pub fn boot(self, payload: &Payload, cmdline: &str) -> Result<ReadyVm, VmError> {
        let inner = self.inner;
        let entry = boot::load(inner.ram.guest(), inner.ram.layout(), payload, cmdline)?;
        for vcpu in &inner.vcpus {
            let mut vcpu = lock(vcpu);
            let cpuid = cpuid::for_vcpu(
                inner.kvm.supported_cpuid(),
                vcpu.index(),
                inner.config.vcpus,
                inner.kvm.tsc_deadline(),
            );
            vcpu.set_cpuid(&cpuid)?;
            vcpu.learn_msrs()?;
            // The others wait for the first one's INIT and SIPI, as KVM creates them.
            if vcpu.index() == 0 {
                boot::enter(vcpu.fd(), entry)?;
            }
        }
        Ok(ReadyVm { inner })
    }

    /// Takes this machine's part out of a state: everything but memory, which the shell already
    /// has, and the sections of others. The guest's clocks go on from where they stood.
    ///
    /// Calls of the guest that were pending at the save stay so: the owner answers them through
    /// [`ReadyVm::doorbell`] before the start.
    pub fn restore(mut self, state: &mut SectionsReader<'_>) -> Result<ReadyVm, VmError> {
        self.inner.restore(state)?;
        self.inner
            .vcpus
            .iter()
            .try_for_each(|vcpu| lock(vcpu).learn_msrs())?;
        Ok(ReadyVm { inner: self.inner })
    }
}

impl Shell {
    /// What stops its devices, for whoever decides its end without being able to call it.
    pub fn brake(&self) -> Brake {
        self.inner.machine.devices.brake.clone()
    }
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
        self.inner.machine.devices.brake.leave_over();
        self.inner.gate.open();
        Vm { inner: self.inner }
    }
}

impl Vm {
    /// Brings all vCPUs to the barrier. On an error the VM runs on.
    pub fn pause(&mut self, deadline: Duration) -> Result<PausedVm<'_>, PauseError> {
        let Inner {
            gate,
            threads,
            machine,
            ..
        } = &self.inner;
        machine.devices.brake.pull();
        if let Err(error) = gate.close(deadline, |vcpu| threads[vcpu as usize].kick.kick()) {
            // In this order: a vCPU that passes the gate looks at what the brake left over.
            machine.devices.brake.release();
            gate.open();
            return Err(error);
        }
        Ok(PausedVm {
            inner: &mut self.inner,
            stays: false,
        })
    }

    /// Lets the vCPU of an answered call go on. The answer itself goes to [`Vm::doorbell`] first.
    pub fn release(&self, vcpu: u32) {
        self.inner.gate.release(vcpu);
    }

    /// Its end is decided, and pages that it misses may be made up to let its threads out: its
    /// devices do nothing any more, and no vCPU comes back to guest code.
    pub fn condemn(&self) {
        self.inner.machine.devices.brake.condemn();
        self.inner.kick_to_end();
    }

    /// The fork doorbell.
    pub fn doorbell(&self) -> MutexGuard<'_, Doorbell> {
        lock(&self.inner.machine.doorbell)
    }

    /// The disks, in the order of the configuration.
    pub fn disks(&self) -> &[Disk] {
        &self.inner.machine.disks
    }

    /// Sends bytes to the guest's serial console; returns how many it has room for.
    pub fn console_input(&self, bytes: &[u8]) -> usize {
        lock(&self.inner.machine.serial).enqueue(bytes)
    }

    /// What the machine is.
    pub fn config(&self) -> &VmConfig {
        &self.inner.config
    }

    /// Its memory.
    pub fn ram(&self) -> &Ram {
        &self.inner.ram
    }

    /// What KVM counts of it. The VM runs on meanwhile.
    pub fn kvm_stats(&self) -> Result<KvmStats, StatsError> {
        KvmStats::read(&self.inner.vm)
    }
}

impl PausedVm<'_> {
    /// Reads the whole state but memory: sections `config`, `host`, `memory`, `kvm/…` and `dev/…`.
    pub fn save(&self) -> Result<Sections, VmError> {
        self.inner.save()
    }

    /// Its memory.
    pub fn ram(&self) -> &Ram {
        &self.inner.ram
    }

    /// Its memory, to map it anew in place.
    pub fn ram_mut(&mut self) -> &mut Ram {
        &mut self.inner.ram
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
        self.inner.gate.has_ended()
    }

    /// Whether its end is decided because pages of its memory cannot be had: what they hold is not to
    /// be relied on.
    pub fn is_condemned(&self) -> bool {
        self.inner.machine.devices.brake.condemned()
    }

    /// What the machine is.
    pub fn config(&self) -> &VmConfig {
        &self.inner.config
    }

    /// One edge on the interrupt line `gsi`, as a device would raise it.
    pub fn pulse(&self, gsi: u32) -> Result<(), VmError> {
        let line = |level| {
            self.inner
                .vm
                .set_irq_line(gsi, level)
                .map_err(call("KVM_IRQ_LINE"))
        };
        line(true)?;
        line(false)
    }

    /// Lets the VM run on, which dropping does as well.
    pub fn resume(self) {}

    /// Ends the borrow but not the pause: the VM stands until it is paused again, which then takes
    /// no time, and resumed.
    pub fn stay(mut self) {
        self.stays = true;
    }
}

impl Drop for PausedVm<'_> {
    fn drop(&mut self) {
        if self.stays {
            return;
        }
        for vcpu in &self.inner.vcpus {
            if let Err(error) = lock(vcpu).note_pause() {
                tracing::warn!(%error, "KVM_KVMCLOCK_CTRL failed; a guest watchdog may bark");
            }
        }
        self.inner.machine.devices.brake.release();
        self.inner.gate.open();
    }
}

impl Inner {
    fn start_threads(&mut self, events: &EventSink) -> Result<(), VmError> {
        for (index, vcpu) in self.vcpus.iter().enumerate() {
            let (tell, told) = sync_channel(1);
            let runner = Runner {
                index: index as u32,
                vcpu: vcpu.clone(),
                gate: self.gate.clone(),
                events: events.clone(),
                has_run: self.has_run.clone(),
                devices: self.machine.devices.clone(),
            };
            let join = thread::Builder::new()
                .name(format!("vcpu{index}"))
                .spawn(move || {
                    allow_kicks();
                    if tell.send(Kick::of_this_thread()).is_ok() {
                        runner.run();
                    }
                })
                .map_err(|source| VmError::Call {
                    call: "starting a vCPU thread",
                    source,
                })?;
            let Ok(kick) = told.recv() else {
                let source = io::Error::other("the thread ended at once");
                return Err(VmError::Call {
                    call: "starting a vCPU thread",
                    source,
                });
            };
            self.threads.push(VcpuThread {
                join: Some(join),
                kick,
            });
        }
        Ok(())
    }
}

impl Inner {
    /// Tells every vCPU thread to end and kicks those that run guest code, once.
    fn kick_to_end(&self) {
        self.gate
            .begin_end(|vcpu| self.threads[vcpu as usize].kick.kick());
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.machine.devices.brake.pull();
        self.gate
            .end(|vcpu| self.threads[vcpu as usize].kick.kick());
        for thread in &mut self.threads {
            // A panic of the thread was already told as the VM's end.
            if let Some(Err(_panic)) = thread.join.take().map(JoinHandle::join) {
                tracing::error!("a vCPU thread panicked");
            }
        }
        if let Err(error) = self.ram.close() {
            tracing::error!(%error, "the memory of a VM that has ended stays mapped");
        }
    }
}

/// What a vCPU thread works with.
struct Runner {
    index: u32,
    vcpu: Arc<Mutex<Vcpu>>,
    gate: Arc<Gate>,
    events: EventSink,
    has_run: Arc<AtomicBool>,
    devices: Devices,
}

impl Runner {
    fn run(self) {
        let reason = match catch_unwind(AssertUnwindSafe(|| self.run_until_end())) {
            Ok(Ok(None)) => None,
            Ok(Ok(Some(reason))) => Some(reason),
            Ok(Err(error)) => Some(EndReason::Failed(error)),
            Err(_panic) => Some(EndReason::Failed(RunError::Panicked { vcpu: self.index })),
        };
        self.gate.leave(self.index, reason.is_some());
        if let Some(reason) = reason {
            (self.events)(VmEvent::Ended(reason));
        }
    }

    /// Passes the gate again and again; `None` when the gate said to end.
    fn run_until_end(&self) -> Result<Option<EndReason>, RunError> {
        while self.gate.pass(self.index) == Passage::Run {
            // Here rather than at the resume: the guest can prolong it, and a vCPU can be braked.
            if self.devices.brake.take_left_over()
                && let Err(error) = self.devices.activate()
            {
                tracing::error!(%error, "requests that a pause left over may stay unserved");
            }
            let mut vcpu = lock(&self.vcpu);
            let kickable = vcpu.kickable();
            // A kick between the gate and here had nothing to set: whoever closed the gate since
            // would wait for a vCPU that nobody calls back.
            if self.gate.called_back() {
                continue;
            }
            if !self.has_run.swap(true, Ordering::Relaxed) {
                (self.events)(VmEvent::Running { at: Instant::now() });
            }
            let ended = self.run_until_stopped(&mut vcpu);
            drop(kickable);
            drop(vcpu);
            if let Some(reason) = ended? {
                return Ok(Some(reason));
            }
        }
        Ok(None)
    }

    /// Runs guest code until a kick, a call, or the end.
    fn run_until_stopped(&self, vcpu: &mut Vcpu) -> Result<Option<EndReason>, RunError> {
        loop {
            let stop = vcpu.run()?;
            let seen = Instant::now();
            match stop {
                Stop::Kicked => {
                    // A kick may have come between an access and its completion.
                    return match vcpu.finish()? {
                        None => Ok(None),
                        Some(stop) => Ok(self.told(vcpu, stop, seen)?.ended),
                    };
                }
                stop => {
                    let told = self.told(vcpu, stop, seen)?;
                    if told.ended.is_some() || told.held {
                        return Ok(told.ended);
                    }
                }
            }
        }
    }

    /// Passes on what an exit means.
    fn told(&self, vcpu: &mut Vcpu, stop: Stop, at: Instant) -> Result<Told, RunError> {
        let mut told = Told {
            ended: None,
            held: false,
        };
        match stop {
            Stop::Kicked | Stop::Effect(Effect::None) => {}
            Stop::Effect(Effect::Report(value)) => (self.events)(VmEvent::Report { value, at }),
            Stop::Effect(Effect::Call(call)) => {
                // The vCPU may be saved while it is held: its `out` has to be over by then.
                if let Some(more) = vcpu.finish()? {
                    tracing::warn!(?more, "an access of a call's own instruction is ignored");
                }
                self.gate.hold(self.index);
                told.held = true;
                (self.events)(VmEvent::Call {
                    vcpu: self.index,
                    call,
                    at,
                });
            }
            Stop::Effect(Effect::Exit(status)) => told.ended = Some(EndReason::Exit(status)),
            Stop::TripleFault => told.ended = Some(EndReason::TripleFault { vcpu: self.index }),
            Stop::SystemEvent { reset: true } => told.ended = Some(EndReason::Reset),
            Stop::SystemEvent { reset: false } => told.ended = Some(EndReason::PowerOff),
        }
        Ok(told)
    }
}

struct Told {
    ended: Option<EndReason>,
    held: bool,
}

/// Has KVM refuse what its CPUID leaves do not offer (KVM_CAP_ENFORCE_PV_FEATURE_CPUID, KVM API 7.23):
/// a guest that turned asynchronous page faults on would be faulting from threads that no pause
/// stops.
fn enforce_pv_features(vm: &VmFd, vcpu: &VcpuFd) -> Result<(), VmError> {
    if vm.check_extension_raw(c_ulong::from(KVM_CAP_ENFORCE_PV_FEATURE_CPUID)) == 0 {
        return Ok(());
    }
    let enforce = kvm_enable_cap {
        cap: KVM_CAP_ENFORCE_PV_FEATURE_CPUID,
        args: [1, 0, 0, 0],
        ..Default::default()
    };
    vcpu.enable_cap(&enforce)
        .map_err(call("KVM_ENABLE_CAP of KVM_CAP_ENFORCE_PV_FEATURE_CPUID"))
}

fn create_vm(kvm: &Kvm) -> Result<VmFd, VmError> {
    loop {
        match kvm.fd().create_vm() {
            // A signal came; KVM has undone what it had begun.
            Err(error) if error.errno() == libc::EINTR => {}
            other => return other.map_err(call("KVM_CREATE_VM")),
        }
    }
}

fn abilities(vm: &VmFd) -> Result<Abilities, VmError> {
    let triple_fault_event = vm.check_extension_raw(KVM_CAP_X86_TRIPLE_FAULT_EVENT.into()) > 0;
    if triple_fault_event {
        let mut cap = kvm_enable_cap {
            cap: KVM_CAP_X86_TRIPLE_FAULT_EVENT,
            ..Default::default()
        };
        cap.args[0] = 1;
        vm.enable_cap(&cap)
            .map_err(call("KVM_ENABLE_CAP(KVM_CAP_X86_TRIPLE_FAULT_EVENT)"))?;
    }
    Ok(Abilities {
        xsave_size: vm.check_extension_int(Cap::Xsave2).max(0) as usize,
        sregs2: vm.check_extension_raw(kvm_bindings::KVM_CAP_SREGS2.into()) > 0,
        triple_fault_event,
    })
}

fn call(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> VmError {
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
    /// The state comes from another kind of host.
    #[error(transparent)]
    Host(#[from] HostError),
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
