//! A VM before it has a state.

use std::iter::repeat_with;
use std::sync::Arc;

use forkvm_devices::Brake;

use super::objects::KvmObjects;
use super::{EventSink, Inner, MachineState, ReadyVm, VmError};
use crate::boot::{self, Payload, Surroundings};
use crate::cpuid;
use crate::kvm::Kvm;
use crate::machine::{Machine, MachineError, Peripherals, VmConfig, lock};
use crate::memory::Ram;
use crate::software_kvm::Relay;

/// A VM with vCPUs and memory slots, but without devices and without a state. Its threads wait.
/// Nothing in it is of the machine that it will be, so it can be built long before that is known.
pub struct Shell {
    objects: KvmObjects,
}

impl Shell {
    /// Builds the KVM objects. `ram` may be [reserved](Ram::reserve) only: it has to be mapped before
    /// the shell gets a state ([`Shell::ram_mut`]).
    pub fn build(kvm: &Arc<Kvm>, vcpus: u32, ram: Ram) -> Result<Shell, VmError> {
        VmConfig::check_vcpus(vcpus)?;
        let objects = KvmObjects::build(kvm, vcpus, ram)?;
        Ok(Shell { objects })
    }

    /// Does ahead what a [`restore`](Shell::restore) of `state`, or of one like it, and a start would
    /// do later: has KVM leave to user space what it must where it is software, gives the vCPUs their CPUID,
    /// has KVM make what it needs to run them, and learns what else they have already. Its memory must be
    /// [reserved](Ram::reserve) only.
    ///
    /// From then on the shell is for states of the [same shape](MachineState::has_shape_of) alone: KVM
    /// fixes the CPUID of a vCPU that has run. For those a restore is as right as without.
    pub fn prime(&mut self, state: &MachineState) -> Result<(), VmError> {
        let prime = |objects: &KvmObjects| -> Result<(), VmError> {
            for (vcpu, state) in objects.vcpus.iter().zip(&state.vcpus) {
                lock(vcpu).prime(state)?;
            }
            Ok(())
        };
        if state.software.is_some() {
            // A filter of MSRs waits for a grace period: 12 ms of a clone's start.
            self.objects.use_software_kvm(repeat_with(Relay::default))?;
        }
        for (vcpu, state) in self.objects.vcpus.iter().zip(&state.vcpus) {
            lock(vcpu).set_cpuid_of(state)?;
        }
        // Twice: registers that are like the machine's make KVM build more of what will be needed, and
        // the exit for want of memory may have reset them.
        prime(&self.objects)?;
        self.objects.warm_up()?;
        prime(&self.objects)
    }

    /// vCPUs.
    pub fn vcpus(&self) -> u32 {
        self.objects.vcpus.len() as u32
    }

    /// Its memory.
    pub fn ram(&self) -> &Ram {
        &self.objects.ram
    }

    /// Its memory, to map it in place.
    pub fn ram_mut(&mut self) -> &mut Ram {
        &mut self.objects.ram
    }

    /// What will stop its devices, for whoever decides its end without being able to call it.
    pub fn brake(&self) -> Brake {
        self.objects.brake.clone()
    }

    /// Puts devices, a payload and a command line in, and the first vCPU at its entry. `events` hears
    /// of calls, reports and the end.
    pub fn boot(
        self,
        config: VmConfig,
        peripherals: Peripherals,
        events: EventSink,
        payload: &Payload,
        cmdline: &str,
    ) -> Result<ReadyVm, VmError> {
        let mut inner = self.furnish(config, peripherals)?;
        // Programs that bring no kernel of their own do without ring 0 where it is interpreted.
        let is_kernel = matches!(payload, Payload::Kernel { .. });
        let software_kvm = is_kernel && !inner.objects.kvm.promises()?.all();
        if software_kvm {
            let unused = repeat_with(Relay::default);
            inner.objects.use_software_kvm(unused)?;
        }
        let Inner {
            config,
            objects,
            machine,
            ..
        } = &inner;
        let around = Surroundings {
            memory: objects.ram.guest(),
            layout: objects.ram.layout(),
            vcpus: config.vcpus,
            slots: &machine.slots,
            software_kvm,
        };
        let entry = boot::load(&around, payload, cmdline)?;
        for vcpu in &objects.vcpus {
            let mut vcpu = lock(vcpu);
            let cpuid = cpuid::for_vcpu(
                objects.kvm.supported_cpuid(),
                vcpu.index(),
                config.vcpus,
                objects.kvm.tsc_deadline(),
            );
            vcpu.set_cpuid(&cpuid)?;
            vcpu.learn_msrs()?;
            // The others wait for the first one's INIT and SIPI, as KVM creates them.
            if vcpu.index() == 0 {
                boot::enter(vcpu.fd(), entry)?;
            }
        }
        inner.listen()?;
        Ok(ReadyVm { inner, events })
    }

    /// Puts devices and a state in: everything but memory, which must be mapped. The guest's clocks go
    /// on from where they stood. `events` hears of calls, reports and the end.
    ///
    /// Calls of the guest that were pending at the save stay so: the owner answers them through
    /// [`ReadyVm::doorbell`] before the start.
    pub fn restore(
        self,
        state: &MachineState,
        peripherals: Peripherals,
        events: EventSink,
    ) -> Result<ReadyVm, VmError> {
        let mut inner = self.furnish(state.config.clone(), peripherals)?;
        inner.restore(state)?;
        for vcpu in &inner.objects.vcpus {
            lock(vcpu).learn_msrs()?;
        }
        inner.listen()?;
        Ok(ReadyVm { inner, events })
    }

    /// Gives it its devices.
    fn furnish(self, config: VmConfig, peripherals: Peripherals) -> Result<Inner, VmError> {
        config.check()?;
        let objects = self.objects;
        if config.vcpus as usize != objects.vcpus.len() {
            let what = format!("{} vCPUs", config.vcpus);
            return Err(VmError::Shape { what });
        }
        let (vm, brake) = (&objects.vm, objects.brake.clone());
        // Until the start.
        brake.pull();
        let machine = Machine::build(vm, &config, objects.ram.guest(), peripherals, brake)?;
        Ok(Inner {
            held: false,
            config,
            machine,
            objects,
        })
    }
}

impl Inner {
    /// Has the devices that the host feeds hear it. The state is in place.
    fn listen(&mut self) -> Result<(), MachineError> {
        let vsock = &mut self.machine.vsock;
        vsock
            .as_mut()
            .map_or(Ok(()), |vsock| vsock.listen())
            .map_err(MachineError::Sockets)
    }
}
