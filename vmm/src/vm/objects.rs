//! The KVM objects of one VM and the threads of its vCPUs: built in the one order that is fast and
//! right, taken apart in the one order that is safe. Knows no devices and no state; `Shell` puts
//! those in.
#![allow(unsafe_code)] // KVM_SET_USER_MEMORY_REGION takes host addresses.

use std::ffi::c_ulong;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

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
use crate::machine::Machine;
use crate::memory::Ram;
use crate::vcpu::{Abilities, Kick, Vcpu, allow_kicks, prepare_signal};

/// Three pages that real-mode emulation on Intel needs, out of the way of RAM and devices
/// (KVM_SET_TSS_ADDR, KVM API 4.36).
const TSS_ADDRESS: usize = 0xfffb_d000;
/// One page for the same purpose (KVM_SET_IDENTITY_MAP_ADDR, KVM API 4.40).
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// See the module's text.
pub(super) struct KvmObjects {
    pub(super) kvm: Arc<Kvm>,
    threads: Vec<VcpuThread>,
    pub(super) gate: Arc<Gate>,
    /// Stops the devices that will be there.
    pub(super) brake: Brake,
    pub(super) vcpus: Vec<Arc<Mutex<Vcpu>>>,
    pub(super) vm: Arc<VmFd>,
    // After everything that reaches it: fields are dropped in this order.
    pub(super) ram: Ram,
}

struct VcpuThread {
    join: Option<JoinHandle<()>>,
    kick: Kick,
    /// Where it waits for what to run.
    start: Option<Sender<Box<Runner>>>,
}

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
        let mut objects = KvmObjects {
            kvm: kvm.clone(),
            threads: Vec::new(),
            gate: Arc::new(Gate::new(vcpus)),
            brake: Brake::default(),
            vcpus: Vec::new(),
            vm,
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

    /// Has the threads run their vCPUs on the devices of `machine`, as far as the gate lets them.
    pub(super) fn start_threads(&mut self, machine: &Machine, events: &EventSink) {
        let has_run = Arc::new(AtomicBool::new(false));
        for (index, (thread, vcpu)) in (0..).zip(self.threads.iter_mut().zip(&self.vcpus)) {
            let runner = Box::new(Runner {
                index,
                vcpu: vcpu.clone(),
                gate: self.gate.clone(),
                events: events.clone(),
                has_run: has_run.clone(),
                buses: machine.buses.clone(),
                devices: machine.devices.clone(),
            });
            let started = thread.start.take().map(|start| start.send(runner));
            debug_assert!(
                started.is_some_and(|sent| sent.is_ok()),
                "a thread waits for this"
            );
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
            // One that was never started ends for want of a sender.
            thread.start = None;
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
        let (start, started) = channel::<Box<Runner>>();
        let join = thread::Builder::new()
            .name(format!("vcpu{index}"))
            .spawn(move || {
                allow_kicks();
                if let Ok(runner) = started.recv() {
                    runner.run();
                }
            })
            .map_err(|source| VmError::Call {
                call: "starting a vCPU thread",
                source,
            })?;
        Ok(VcpuThread {
            kick: Kick::of(&join),
            join: Some(join),
            start: Some(start),
        })
    }
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
