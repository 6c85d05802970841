//! Sections of a machine's state: which there are, and who reads and writes each.

use std::sync::Mutex;

use forkvm_devices::section::SectionsReader;
use forkvm_devices::{Doorbell, SavedState, Section, Sections};
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
};
use serde::{Deserialize, Serialize};

use super::*;
use crate::kvm::{Kvm, KvmFlavour};
use crate::memory::MemoryLayout;
use crate::software_kvm::SoftwareState;
use crate::vcpu::{Clock, Vcpu, VcpuState, named_pages, reading, writing};

pub(super) const CONFIG: &str = "config";
pub(super) const HOST: &str = "host";
pub(super) const MEMORY: &str = "memory";
const KVM_VM: &str = "kvm/vm";
const KVM_SOFTWARE: &str = "kvm/software";

pub(super) fn vcpu_section(index: u32) -> String {
    format!("kvm/vcpu/{index}")
}

/// Names of the sections of devices begin with this.
const DEVICES: &str = "dev/";

fn device_section(name: &str) -> String {
    format!("{DEVICES}{name}")
}

impl VmConfig {
    /// Of the machine whose state this is.
    pub fn of_state(state: &Sections) -> Result<VmConfig, SectionError> {
        match state.find(CONFIG) {
            Some(section) => section.decode(),
            None => Err(SectionError::Missing {
                kind: CONFIG.into(),
            }),
        }
    }
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

/// The state of a machine but its memory: all that a [`Shell`](super::Shell) needs to become it, any
/// number of times.
#[derive(Clone, Debug)]
pub struct MachineState {
    pub(super) config: VmConfig,
    host: HostState,
    layout: MemoryLayout,
    vm: KvmVmState,
    pub(super) vcpus: Vec<VcpuState>,
    /// What stood in for parts of KVM, if something did.
    pub(super) software: Option<SoftwareState>,
    /// One section a device.
    devices: Vec<Section>,
}

impl MachineState {
    /// Whether a shell that was primed with `other` can take this state: RAM of the same layout, and as
    /// many vCPUs with the same CPUID.
    pub fn has_shape_of(&self, other: &MachineState) -> bool {
        let cpuids = || self.vcpus.iter().zip(&other.vcpus);
        self.layout == other.layout
            && self.vcpus.len() == other.vcpus.len()
            && self.software.is_some() == other.software.is_some()
            && cpuids().all(|(one, other)| one.has_cpuid_of(other))
    }

    /// Takes a machine's part out of a state: all but the sections of others.
    pub fn take_from(state: &mut SectionsReader<'_>) -> Result<MachineState, VmError> {
        let config: VmConfig = state.decode(CONFIG)?;
        config.check()?;
        let host = state.decode(HOST)?;
        let MemoryState { layout } = state.decode(MEMORY)?;
        if layout != MemoryLayout::new(config.memory_mib)? {
            let what = format!("the memory layout {layout:?}");
            return Err(VmError::Shape { what });
        }
        let vm = state.decode(KVM_VM)?;
        let vcpus = (0..config.vcpus).map(|index| state.decode(&vcpu_section(index)));
        let vcpus = vcpus.collect::<Result<_, _>>()?;
        let software = SoftwareState::take_from(state, config.vcpus)?;
        Ok(MachineState {
            vcpus,
            config,
            host,
            layout,
            vm,
            software,
            devices: state.take_all(DEVICES).into_iter().cloned().collect(),
        })
    }

    /// As sections `config`, `host`, `memory`, `kvm/…` and `dev/…`.
    pub fn to_sections(&self) -> Result<Sections, SectionError> {
        let mut sections = Sections::default();
        sections.push(Section::encode(CONFIG, &self.config)?)?;
        sections.push(Section::encode(HOST, &self.host)?)?;
        let layout = self.layout.clone();
        sections.push(Section::encode(MEMORY, &MemoryState { layout })?)?;
        sections.push(Section::encode(KVM_VM, &self.vm)?)?;
        for (index, vcpu) in (0..).zip(&self.vcpus) {
            sections.push(Section::encode(vcpu_section(index), vcpu)?)?;
        }
        if let Some(software) = &self.software {
            sections.push(Section::encode(KVM_SOFTWARE, software)?)?;
        }
        for device in &self.devices {
            sections.push(device.clone())?;
        }
        Ok(sections)
    }

    /// What the machine is.
    pub fn config(&self) -> &VmConfig {
        &self.config
    }

    /// Where its RAM lies.
    pub fn layout(&self) -> &MemoryLayout {
        &self.layout
    }

    /// The guest-physical pages that its vCPUs will touch first; see `vcpu/named_pages.rs`. `read`
    /// returns the 64-bit word at a guest-physical address, or `None` where there is no RAM.
    pub fn named_pages(&self, read: &mut dyn FnMut(u64) -> Option<u64>) -> Vec<u64> {
        named_pages(&self.vcpus, read)
    }

    /// Guest-physical address of the page of its doorbell, if it has one.
    pub fn doorbell_page(&self) -> Result<Option<u64>, SectionError> {
        Doorbell::saved_page(&self.devices)
    }
}

impl SoftwareState {
    /// The section, if there is one: with a part for each vCPU.
    fn take_from(
        state: &mut SectionsReader<'_>,
        vcpus: u32,
    ) -> Result<Option<SoftwareState>, VmError> {
        let software: SoftwareState = match state.decode(KVM_SOFTWARE) {
            Err(SectionError::Missing { .. }) => return Ok(None),
            other => other?,
        };
        if software.vcpus.len() != vcpus as usize {
            let what = format!("{KVM_SOFTWARE} of {} vCPUs", software.vcpus.len());
            return Err(VmError::Shape { what });
        }
        Ok(Some(software))
    }
}

impl Inner {
    pub(super) fn save(&self) -> Result<MachineState, VmError> {
        let vcpu = |vcpu: &Arc<Mutex<Vcpu>>| lock(vcpu).save();
        let vcpus = self.objects.vcpus.iter().map(vcpu);
        let mut devices = Vec::new();
        let state = MachineState {
            config: self.config.clone(),
            host: HostState::here(&self.objects.kvm),
            layout: self.objects.ram.layout().clone(),
            vm: self.save_vm()?,
            vcpus: vcpus.collect::<Result<_, _>>()?,
            software: self.objects.software_state(),
            devices: Vec::new(),
        };
        self.machine.devices.each(|device| -> Result<(), VmError> {
            devices.push(device.save()?);
            Ok(())
        })?;
        Ok(MachineState { devices, ..state })
    }

    pub(super) fn restore(&mut self, state: &MachineState) -> Result<(), VmError> {
        state.host.check(&HostState::here(&self.objects.kvm))?;
        if state.layout != *self.objects.ram.layout() {
            let what = format!("the memory layout {:?}", state.layout);
            return Err(VmError::Shape { what });
        }
        self.restore_with(state, Vcpu::restore)
    }

    /// The same for a machine that has run, and was started from this very state.
    pub(super) fn rewind(&mut self, state: &MachineState) -> Result<(), VmError> {
        self.restore_with(state, Vcpu::rewind)
    }

    fn restore_with(
        &mut self,
        state: &MachineState,
        restore: impl Fn(&mut Vcpu, &VcpuState, Clock, Clock) -> Result<(), StateError>,
    ) -> Result<(), VmError> {
        self.restore_vm(&state.vm)?;
        if let Some(software) = &state.software {
            self.objects
                .use_software_kvm(software.vcpus.iter().cloned())?;
        }
        let now = Clock::now();
        for (vcpu, saved) in self.objects.vcpus.iter().zip(&state.vcpus) {
            restore(&mut lock(vcpu), saved, state.vm.saved, now)?;
        }
        let mut unread: Vec<&Section> = state.devices.iter().collect();
        self.machine.devices.each(|device| -> Result<(), VmError> {
            let kind = device_section(device.name());
            let Some(index) = unread.iter().position(|section| section.kind == kind) else {
                return Err(SectionError::Missing { kind }.into());
            };
            Ok(device.restore(unread.remove(index))?)
        })?;
        if let Some(vsock) = &self.machine.vsock {
            vsock.identify();
        }
        match unread.first() {
            Some(section) => Err(SectionError::Unread {
                kind: section.kind.clone(),
            }
            .into()),
            None => Ok(()),
        }
    }

    fn save_vm(&self) -> Result<KvmVmState, StateError> {
        let chip = |chip_id| -> Result<kvm_irqchip, StateError> {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            self.objects
                .vm
                .get_irqchip(&mut chip)
                .map_err(reading("IRQCHIP"))?;
            Ok(chip)
        };
        let mut clock = self.objects.vm.get_clock().map_err(reading("CLOCK"))?;
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
            self.objects
                .vm
                .set_irqchip(chip)
                .map_err(writing("IRQCHIP"))?;
        }
        self.objects
            .vm
            .set_clock(&state.clock)
            .map_err(writing("CLOCK"))
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
