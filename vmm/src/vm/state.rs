//! Sections of a machine's state: which there are, and who reads and writes each.

use forkvm_devices::SavedState;
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
};
use serde::{Deserialize, Serialize};

use super::*;
use crate::kvm::KvmFlavour;
use crate::memory::MemoryLayout;
use crate::vcpu::{reading, writing};

pub(super) const CONFIG: &str = "config";
pub(super) const HOST: &str = "host";
pub(super) const MEMORY: &str = "memory";
const KVM_VM: &str = "kvm/vm";

pub(super) fn vcpu_section(index: u32) -> String {
    format!("kvm/vcpu/{index}")
}

fn device_section(name: &str) -> String {
    format!("dev/{name}")
}

/// Section `host`: where the state was taken. Compared at a restore.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct HostState {
    kvm: KvmFlavour,
    /// CPUID leaf 0: `GenuineIntel`, `AuthenticAMD`, …
    cpu_vendor: String,
    /// CPUID leaf 1, EAX: family, model and stepping.
    cpu_signature: u32,
}

impl SavedState for HostState {
    const VERSION: u16 = 1;
}

/// Section `memory`: where RAM lies. Its content is elsewhere.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct MemoryState {
    pub(super) layout: MemoryLayout,
}

impl SavedState for MemoryState {
    const VERSION: u16 = 1;
}

/// Section `kvm/vm`: the interrupt controllers and the clock.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct KvmVmState {
    pic_master: kvm_irqchip,
    pic_slave: kvm_irqchip,
    ioapic: kvm_irqchip,
    clock: kvm_clock_data,
    /// Host TSC at the save, for the vCPUs.
    saved: Clock,
}

impl SavedState for KvmVmState {
    const VERSION: u16 = 1;
}

impl Inner {
    pub(super) fn save(&self) -> Result<Sections, VmError> {
        let mut sections = Sections::default();
        sections.push(Section::encode(CONFIG, &self.config)?)?;
        sections.push(Section::encode(HOST, &HostState::here(&self.kvm))?)?;
        let layout = self.ram.layout().clone();
        sections.push(Section::encode(MEMORY, &MemoryState { layout })?)?;
        sections.push(Section::encode(KVM_VM, &self.save_vm()?)?)?;
        for (index, vcpu) in (0..).zip(&self.vcpus) {
            sections.push(Section::encode(vcpu_section(index), &lock(vcpu).save()?)?)?;
        }
        self.machine
            .devices
            .each(|device| -> Result<(), VmError> { Ok(sections.push(device.save()?)?) })?;
        Ok(sections)
    }

    pub(super) fn restore(&mut self, state: &mut SectionsReader<'_>) -> Result<(), VmError> {
        let host: HostState = state.decode(HOST)?;
        host.check(&HostState::here(&self.kvm))?;
        let config: VmConfig = state.decode(CONFIG)?;
        if config != self.config {
            let what = format!("the configuration {config:?}");
            return Err(VmError::Shape { what });
        }
        let memory: MemoryState = state.decode(MEMORY)?;
        if memory.layout != *self.ram.layout() {
            let what = format!("the memory layout {:?}", memory.layout);
            return Err(VmError::Shape { what });
        }
        let vm: KvmVmState = state.decode(KVM_VM)?;
        self.restore_vm(&vm)?;
        let now = Clock::now();
        for (index, vcpu) in (0..).zip(&self.vcpus) {
            let saved: VcpuState = state.decode(&vcpu_section(index))?;
            lock(vcpu).restore(&saved, vm.saved, now)?;
        }
        self.machine.devices.each(|device| -> Result<(), VmError> {
            let section = state.take(&device_section(device.name()))?;
            Ok(device.restore(section)?)
        })
    }

    fn save_vm(&self) -> Result<KvmVmState, StateError> {
        let chip = |chip_id| -> Result<kvm_irqchip, StateError> {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            self.vm.get_irqchip(&mut chip).map_err(reading("IRQCHIP"))?;
            Ok(chip)
        };
        let mut clock = self.vm.get_clock().map_err(reading("CLOCK"))?;
        // At a restore the clock goes on from its value; with a flag left in, KVM would add the
        // time that passed in between.
        clock.flags = 0;
        Ok(KvmVmState {
            pic_master: chip(KVM_IRQCHIP_PIC_MASTER)?,
            pic_slave: chip(KVM_IRQCHIP_PIC_SLAVE)?,
            ioapic: chip(KVM_IRQCHIP_IOAPIC)?,
            clock,
            saved: Clock::now(),
        })
    }

    fn restore_vm(&self, state: &KvmVmState) -> Result<(), StateError> {
        for chip in [&state.pic_master, &state.pic_slave, &state.ioapic] {
            self.vm.set_irqchip(chip).map_err(writing("IRQCHIP"))?;
        }
        self.vm.set_clock(&state.clock).map_err(writing("CLOCK"))
    }
}

impl HostState {
    fn here(kvm: &Kvm) -> HostState {
        let leaf = |function| {
            kvm.supported_cpuid()
                .as_slice()
                .iter()
                .find(move |entry| entry.function == function)
        };
        let vendor = leaf(0).map_or(Vec::new(), |entry| {
            [entry.ebx, entry.edx, entry.ecx]
                .iter()
                .flat_map(|word| word.to_le_bytes())
                .collect()
        });
        HostState {
            kvm: kvm.flavour(),
            cpu_vendor: String::from_utf8_lossy(&vendor).into_owned(),
            cpu_signature: leaf(1).map_or(0, |entry| entry.eax),
        }
    }

    fn check(&self, here: &HostState) -> Result<(), HostError> {
        if self == here {
            Ok(())
        } else {
            Err(HostError {
                saved: self.text(),
                here: here.text(),
            })
        }
    }

    pub(super) fn text(&self) -> String {
        let HostState {
            kvm,
            cpu_vendor,
            cpu_signature,
        } = self;
        format!("KVM flavour {kvm} on {cpu_vendor} CPU {cpu_signature:#x}")
    }
}

/// The state was saved on another kind of host.
#[derive(Debug, Error, PartialEq, Eq)]
#[error(
    "the machine was saved with {saved}, and this host has {here}: restore it on one like that"
)]
pub struct HostError {
    /// Where it was saved.
    pub saved: String,
    /// Where it should be restored.
    pub here: String,
}
