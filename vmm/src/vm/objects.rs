//! The KVM objects of one VM and the threads of its vCPUs: built in the one order that is fast and
//! right, taken apart in the one order that is safe. Knows no devices and no state; `Shell` puts
//! those in.
#![allow(unsafe_code)] // KVM_SET_USER_MEMORY_REGION takes host addresses.

use std::ffi::c_ulong;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, RecvError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use forkvm_devices::Brake;
use kvm_bindings::{
    KVM_CAP_ENFORCE_PV_FEATURE_CPUID, KVM_CAP_X86_TRIPLE_FAULT_EVENT, kvm_enable_cap,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, VcpuFd, VmFd};

use super::runner::Runner;
use super::{EventSink, VmError, call};
use crate::gate::Gate;
use crate::kvm::Kvm;
use crate::machine::{Machine, lock};
use crate::memory::{Backing, Ram, RamRegion};
use crate::software_kvm::{FallbackCounts, Relay, SoftwareKvm, SoftwareState};
use crate::vcpu::{Abilities, Kick, Vcpu, allow_kicks, prepare_signal};

/// Three pages that real-mode emulation on Intel needs, out of the way of RAM and devices
/// (KVM_SET_TSS_ADDR, KVM API 4.36).
const TSS_ADDRESS: usize = 0xfffb_d000;
/// One page for the same purpose (KVM_SET_IDENTITY_MAP_ADDR, KVM API 4.40).
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// How long a first entry may take that finds no memory: some 100 us, where the host is not busy.
const WARM_UP_DEADLINE: Duration = Duration::from_secs(2);

/// See the module's text.
pub(super) struct KvmObjects {
    pub(super) kvm: Arc<Kvm>,
    threads: Vec<VcpuThread>,
    pub(super) gate: Arc<Gate>,
    /// Whether the owner was told of the first KVM_RUN.
    pub(super) has_run: Arc<AtomicBool>,
    /// Stops the devices that will be there.
    pub(super) brake: Brake,
    pub(super) vcpus: Vec<Arc<Mutex<Vcpu>>>,
    pub(super) vm: Arc<VmFd>,
    /// What was done for KVM, if it is one that needs that.
    pub(super) fallbacks: Option<Arc<Mutex<FallbackCounts>>>,
    // After everything that reaches it: fields are dropped in this order.
    pub(super) ram: Ram,
}

struct VcpuThread {
    join: Option<JoinHandle<()>>,
    kick: Kick,
    /// Where it waits for something to do; it ends when this is gone.
    tasks: Option<Sender<Task>>,
}

/// What a vCPU's thread is to do.
type Task = Box<dyn FnOnce() + Send>;

impl KvmObjects {
    /// Builds them. The order is the point of this function, see the comments.
    pub(super) fn build(kvm: &Arc<Kvm>, vcpus: u32, ram: Ram) -> Result<KvmObjects, VmError> {
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
        for slot in slots(&ram) {
            // SAFETY: the range is mapped by `ram`, which is dropped after the VM.
            unsafe { vm.set_user_memory_region(slot) }
                .map_err(call("KVM_SET_USER_MEMORY_REGION"))?;
        }
        // Before the vCPUs, which get their LAPICs from it. No PIT: it makes the VM's end 20 ms
        // slower, and guests here keep time by kvmclock and the LAPIC.
        vm.create_irq_chip().map_err(call("KVM_CREATE_IRQCHIP"))?;
        let mut objects = KvmObjects {
            kvm: kvm.clone(),
            threads: Vec::new(),
            gate: Arc::new(Gate::new(vcpus)),
            has_run: Arc::default(),
            brake: Brake::default(),
            vcpus: Vec::new(),
            vm,
            fallbacks: None,
            ram,
        };
        for index in 0..vcpus {
            let fd = objects
                .vm
                .create_vcpu(u64::from(index))
                .map_err(call("KVM_CREATE_VCPU"))?;
            enforce_pv_features(&objects.vm, &fd)?;
            let vcpu = Vcpu::new(fd, index, kvm.clone(), abilities);
            objects.vcpus.push(Arc::new(Mutex::new(vcpu)));
            objects.threads.push(VcpuThread::new(index)?);
        }
        Ok(objects)
    }

    /// Makes up for what a software KVM lacks. `relays` is how that stood, of each vCPU.
    pub(super) fn use_software_kvm(
        &mut self,
        relays: impl IntoIterator<Item = Relay>,
    ) -> Result<(), VmError> {
        if self.fallbacks.is_none() {
            SoftwareKvm::prepare(&self.vm)?;
        }
        let counts = self.fallbacks.get_or_insert_default();
        for (vcpu, relay) in self.vcpus.iter().zip(relays) {
            let memory = self.ram.guest().clone();
            lock(vcpu).use_software_kvm(memory, relay, counts.clone());
        }
        Ok(())
    }

    /// How that stands.
    pub(super) fn software_state(&self) -> Option<SoftwareState> {
        let relays = self.vcpus.iter().map(|vcpu| lock(vcpu).relay());
        let vcpus: Option<_> = relays.collect();
        Some(SoftwareState { vcpus: vcpus? })
    }

    /// Deletes the memory slots and adds them again: whatever KVM has derived from the guest's memory,
    /// the shadows of its page tables above all, goes. No vCPU may run meanwhile.
    pub(super) fn readd_slots(&self) -> Result<(), VmError> {
        for slot in slots(&self.ram) {
            let deleted = kvm_userspace_memory_region {
                memory_size: 0,
                ..slot
            };
            for slot in [deleted, slot] {
                // SAFETY: as in `build`.
                unsafe { self.vm.set_user_memory_region(slot) }
                    .map_err(call("KVM_SET_USER_MEMORY_REGION"))?;
            }
        }
        Ok(())
    }

    /// Has each vCPU enter guest mode once, where it finds no memory, and waits until all have. In the
    /// threads that will run them: up to Linux 6.12 a KVM_RUN in another thread than the last one
    /// waits for a grace period of RCU, which takes milliseconds.
    pub(super) fn warm_up(&mut self) -> Result<(), VmError> {
        if !matches!(self.ram.backing(), Backing::Reserved) {
            let what = "memory, in which its vCPUs would run".to_owned();
            return Err(VmError::NotWarmed { what });
        }
        let warming = self.threads.iter().zip(&self.vcpus).map(|(thread, vcpu)| {
            let (warm, warmed) = channel();
            let vcpu = vcpu.clone();
            thread.does(Box::new(move || {
                let sent = warm.send(lock(&vcpu).warm_up());
                debug_assert!(sent.is_ok(), "all are waited for");
            }));
            warmed
        });
        let warming: Vec<Receiver<_>> = warming.collect();
        // No KVM is known that does not come back by itself.
        let deadline = Instant::now() + WARM_UP_DEADLINE;
        let warmed = (0..).zip(&warming).map(|(vcpu, warmed)| {
            let left = deadline.saturating_duration_since(Instant::now());
            warmed.recv_timeout(left).or_else(|_late_or_gone| {
                self.kick(vcpu);
                warmed.recv()
            })
        });
        let warmed: Vec<_> = warmed.collect();
        for warmed in warmed {
            let panicked = |_gone: RecvError| VmError::NotWarmed {
                what: "a vCPU thread that panicked".into(),
            };
            warmed.map_err(panicked)?.map_err(VmError::Run)?;
        }
        Ok(())
    }

    /// Has the threads run their vCPUs on the devices of `machine`, as far as the gate lets them.
    pub(super) fn start_threads(&mut self, machine: &Machine, events: &EventSink) {
        for (index, (thread, vcpu)) in (0..).zip(self.threads.iter_mut().zip(&self.vcpus)) {
            let runner = Box::new(Runner {
                index,
                vcpu: vcpu.clone(),
                gate: self.gate.clone(),
                events: events.clone(),
                has_run: self.has_run.clone(),
                buses: machine.buses.clone(),
                devices: machine.devices.clone(),
            });
            thread.does(Box::new(|| runner.run()));
            // It ends after that.
            thread.tasks = None;
        }
    }

    /// Gets the thread of `vcpu` out of guest code.
    pub(super) fn kick(&self, vcpu: u32) {
        self.threads[vcpu as usize].kick.kick();
    }

    /// Tells every vCPU thread to end and kicks those that run guest code, once.
    pub(super) fn kick_to_end(&self) {
        self.gate.begin_end(|vcpu| self.kick(vcpu));
    }

    /// Ends the threads, then takes the memory away from under the VM. Once.
    pub(super) fn end(&mut self) {
        self.brake.pull();
        self.gate.end(|vcpu| self.kick(vcpu));
        for thread in &mut self.threads {
            // One that was never started ends for want of a task.
            thread.tasks = None;
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

impl Drop for KvmObjects {
    fn drop(&mut self) {
        self.end();
    }
}

impl VcpuThread {
    fn new(index: u32) -> Result<VcpuThread, VmError> {
        let (tasks, given) = channel::<Task>();
        let join = thread::Builder::new()
            .name(format!("vcpu{index}"))
            .spawn(move || {
                allow_kicks();
                for task in given {
                    task();
                }
            })
            .map_err(|source| VmError::Call {
                call: "starting a vCPU thread",
                source,
            })?;
        Ok(VcpuThread {
            kick: Kick::of(&join),
            join: Some(join),
            tasks: Some(tasks),
        })
    }

    fn does(&self, task: Task) {
        let sent = self.tasks.as_ref().map(|tasks| tasks.send(task));
        debug_assert!(
            sent.is_some_and(|sent| sent.is_ok()),
            "a thread waits for this"
        );
    }
}

/// The memory slots of a machine with this RAM.
fn slots(ram: &Ram) -> impl Iterator<Item = kvm_userspace_memory_region> + '_ {
    let slot =
        |(slot, (region, address)): (u32, (RamRegion, *mut u8))| kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start,
            memory_size: region.len,
            userspace_addr: address as u64,
        };
    (0..).zip(ram.host_ranges()).map(slot)
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
