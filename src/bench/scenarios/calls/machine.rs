//! The calls that build a VM, put a vCPU's state in, and end it.
#![allow(unsafe_code)] // KVM_SET_USER_MEMORY_REGION takes host addresses, KVM_SET_XSAVE an area.

use std::time::Instant;

use forkvm_vmm::{MemoryLayout, Ram};
use kvm_bindings::{
    CpuId, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_MAX_CPUID_ENTRIES, Msrs, kvm_clock_data, kvm_irqchip, kvm_msr_entry,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use crate::bench::measure::{BenchError, Experiment, Repetitions, Samples, Unit, call};

/// RAM of the slot that is measured most, in MiB.
const SLOT_MIB: u64 = 512;
/// Of a large one.
const LARGE_SLOT_MIB: u64 = 4096;

/// Notes how long `act` takes as a case.
fn timed<T>(
    samples: &mut Samples,
    case: &str,
    act: impl FnOnce() -> Result<T, kvm_ioctls::Error>,
    name: &'static str,
) -> Result<T, BenchError> {
    let start = Instant::now();
    let done = act();
    let took = start.elapsed();
    let done = done.map_err(call(name))?;
    samples.time(case, Unit::Us, took);
    Ok(done)
}

/// Puts `ram` into slots of `vm`, from slot `first` on.
fn set_slots(vm: &VmFd, ram: &Ram, first: u32) -> Result<(), kvm_ioctls::Error> {
    for (slot, (region, address)) in (first..).zip(ram.host_ranges()) {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start,
            memory_size: region.len,
            userspace_addr: address as u64,
        };
        // SAFETY: the range is mapped by `ram`, which the callers keep longer than the VM.
        unsafe { vm.set_user_memory_region(region) }?;
    }
    Ok(())
}

/// What every repetition needs.
struct Host {
    kvm: Kvm,
    ram: Ram,
    large: Ram,
    cpuid: CpuId,
    msrs: Msrs,
}

impl Host {
    fn open() -> Result<Host, BenchError> {
        let kvm = Kvm::new().map_err(call("opening /dev/kvm"))?;
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(call("KVM_GET_SUPPORTED_CPUID"))?;
        let list = kvm
            .get_msr_index_list()
            .map_err(call("KVM_GET_MSR_INDEX_LIST"))?;
        let entries: Vec<kvm_msr_entry> = list
            .as_slice()
            .iter()
            .map(|&index| kvm_msr_entry {
                index,
                ..kvm_msr_entry::default()
            })
            .collect();
        let msrs = Msrs::from_entries(&entries).map_err(|error| BenchError::Call {
            call: "a list of MSRs",
            source: std::io::Error::other(format!("{error:?}")),
        })?;
        Ok(Host {
            kvm,
            cpuid,
            msrs,
            ram: Ram::new(MemoryLayout::new(SLOT_MIB)?)?,
            large: Ram::new(MemoryLayout::new(LARGE_SLOT_MIB)?)?,
        })
    }
}

/// Calls on a VM that is made anew each time.
pub(super) struct Calls {
    name: String,
    times: Repetitions,
    make: fn(&Host, &mut Samples) -> Result<(), BenchError>,
    host: Option<Host>,
}

impl Calls {
    /// A VM from its first call to its end.
    pub(super) fn whole_life(measured: u32) -> Calls {
        let warm_up = 3;
        Calls {
            name: "create-vm".into(),
            times: Repetitions { warm_up, measured },
            make: whole_life,
            host: None,
        }
    }

    /// A memory slot that comes after the irqchip.
    pub(super) fn late_slot(measured: u32) -> Calls {
        let warm_up = 1;
        Calls {
            name: late_slot_case(),
            times: Repetitions { warm_up, measured },
            make: late_slot,
            host: None,
        }
    }
}

impl Experiment for Calls {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn repetitions(&self) -> Repetitions {
        self.times
    }

    fn prepare(&mut self) -> Result<(), BenchError> {
        self.host = Some(Host::open()?);
        Ok(())
    }

    fn repeat(&mut self, samples: &mut Samples) -> Result<(), BenchError> {
        match &self.host {
            Some(host) => (self.make)(host, samples),
            None => Ok(()),
        }
    }
}

fn whole_life(host: &Host, samples: &mut Samples) -> Result<(), BenchError> {
    let vm = timed(
        samples,
        "create-vm",
        || host.kvm.create_vm(),
        "KVM_CREATE_VM",
    )?;
    let before = |mib: u64| format!("memslot/{mib}-MiB/before-irqchip");
    let slot = "KVM_SET_USER_MEMORY_REGION";
    timed(
        samples,
        &before(SLOT_MIB),
        || set_slots(&vm, &host.ram, 0),
        slot,
    )?;
    timed(
        samples,
        "create-irqchip",
        || vm.create_irq_chip(),
        "KVM_CREATE_IRQCHIP",
    )?;
    let mut vcpu = timed(
        samples,
        "create-vcpu",
        || vm.create_vcpu(0),
        "KVM_CREATE_VCPU",
    )?;
    timed(
        samples,
        "set-cpuid2",
        || vcpu.set_cpuid2(&host.cpuid),
        "KVM_SET_CPUID2",
    )?;
    set_registers(samples, &vcpu, &host.msrs)?;
    set_vm_state(samples, &vm)?;
    run(samples, &mut vcpu)?;
    for (case, act) in [
        ("close-vcpu", Box::new(|| drop(vcpu)) as Box<dyn FnOnce()>),
        ("close-vm", Box::new(|| drop(vm))),
    ] {
        let start = Instant::now();
        act();
        samples.time(case, Unit::Us, start.elapsed());
    }
    let other = host.kvm.create_vm().map_err(call("KVM_CREATE_VM"))?;
    timed(
        samples,
        &before(LARGE_SLOT_MIB),
        || set_slots(&other, &host.large, 0),
        slot,
    )?;
    Ok(())
}

fn late_slot_case() -> String {
    format!("memslot/{SLOT_MIB}-MiB/after-irqchip")
}

fn late_slot(host: &Host, samples: &mut Samples) -> Result<(), BenchError> {
    let vm = host.kvm.create_vm().map_err(call("KVM_CREATE_VM"))?;
    vm.create_irq_chip().map_err(call("KVM_CREATE_IRQCHIP"))?;
    let set = || set_slots(&vm, &host.ram, 0);
    let case = late_slot_case();
    timed(samples, &case, set, "KVM_SET_USER_MEMORY_REGION")
}

/// Reads the clock and the chips of the irqchip and puts them in again.
fn set_vm_state(samples: &mut Samples, vm: &VmFd) -> Result<(), BenchError> {
    for (chip_id, name) in [
        (KVM_IRQCHIP_PIC_MASTER, "pic-master"),
        (KVM_IRQCHIP_PIC_SLAVE, "pic-slave"),
        (KVM_IRQCHIP_IOAPIC, "ioapic"),
    ] {
        let mut chip = kvm_irqchip {
            chip_id,
            ..Default::default()
        };
        let case = format!("get-irqchip/{name}");
        timed(
            samples,
            &case,
            || vm.get_irqchip(&mut chip),
            "KVM_GET_IRQCHIP",
        )?;
        let case = format!("set-irqchip/{name}");
        timed(samples, &case, || vm.set_irqchip(&chip), "KVM_SET_IRQCHIP")?;
    }
    let clock = timed(samples, "get-clock", || vm.get_clock(), "KVM_GET_CLOCK")?;
    let clock = kvm_clock_data {
        clock: clock.clock,
        ..Default::default()
    };
    timed(
        samples,
        "set-clock",
        || vm.set_clock(&clock),
        "KVM_SET_CLOCK",
    )
}

/// Enters KVM_RUN and comes back before the guest has run.
fn run(samples: &mut Samples, vcpu: &mut VcpuFd) -> Result<(), BenchError> {
    vcpu.set_kvm_immediate_exit(1);
    // The first one makes what later ones find.
    for case in ["run/immediate-exit/first", "run/immediate-exit"] {
        let start = Instant::now();
        let left = vcpu.run().map(drop);
        let took = start.elapsed();
        match left {
            Err(error) if error.errno() == libc::EINTR => samples.time(case, Unit::Us, took),
            Err(error) => return Err(call("KVM_RUN")(error)),
            Ok(()) => {
                let ran = std::io::Error::other("the guest ran in spite of immediate_exit");
                return Err(call("KVM_RUN")(ran));
            }
        };
    }
    Ok(())
}

/// Reads each class of registers and puts it in again.
fn set_registers(samples: &mut Samples, vcpu: &VcpuFd, msrs: &Msrs) -> Result<(), BenchError> {
    let get = || vcpu.get_mp_state();
    let mp_state = timed(samples, "get-mp-state", get, "KVM_GET_MP_STATE")?;
    let get = || vcpu.get_sregs();
    let sregs = timed(samples, "get-sregs", get, "KVM_GET_SREGS")?;
    let get = || vcpu.get_regs();
    let regs = timed(samples, "get-regs", get, "KVM_GET_REGS")?;
    let get = || vcpu.get_xcrs();
    let xcrs = timed(samples, "get-xcrs", get, "KVM_GET_XCRS")?;
    let get = || vcpu.get_xsave();
    let xsave = timed(samples, "get-xsave", get, "KVM_GET_XSAVE")?;
    let get = || vcpu.get_debug_regs();
    let debug = timed(samples, "get-debugregs", get, "KVM_GET_DEBUGREGS")?;
    let get = || vcpu.get_lapic();
    let lapic = timed(samples, "get-lapic", get, "KVM_GET_LAPIC")?;
    let get = || vcpu.get_vcpu_events();
    let events = timed(samples, "get-vcpu-events", get, "KVM_GET_VCPU_EVENTS")?;
    let mut known = msrs.clone();
    // KVM reads them in order and stops at the first that it does not know for this vCPU.
    let get = || vcpu.get_msrs(&mut known);
    let read = timed(samples, "get-msrs", get, "KVM_GET_MSRS")?;
    let known =
        Msrs::from_entries(&known.as_slice()[..read]).map_err(|error| BenchError::Call {
            call: "a list of MSRs",
            source: std::io::Error::other(format!("{error:?}")),
        })?;
    // In the order of a restore.
    let set = || vcpu.set_mp_state(mp_state);
    timed(samples, "set-mp-state", set, "KVM_SET_MP_STATE")?;
    timed(
        samples,
        "set-sregs",
        || vcpu.set_sregs(&sregs),
        "KVM_SET_SREGS",
    )?;
    timed(samples, "set-regs", || vcpu.set_regs(&regs), "KVM_SET_REGS")?;
    timed(samples, "set-xcrs", || vcpu.set_xcrs(&xcrs), "KVM_SET_XCRS")?;
    // SAFETY: the area is one that KVM has just filled, and no dynamic feature was enabled.
    let set = || unsafe { vcpu.set_xsave(&xsave) };
    timed(samples, "set-xsave", set, "KVM_SET_XSAVE")?;
    let set = || vcpu.set_debug_regs(&debug);
    timed(samples, "set-debugregs", set, "KVM_SET_DEBUGREGS")?;
    timed(
        samples,
        "set-lapic",
        || vcpu.set_lapic(&lapic),
        "KVM_SET_LAPIC",
    )?;
    let set = || vcpu.set_msrs(&known).map(drop);
    timed(samples, "set-msrs", set, "KVM_SET_MSRS")?;
    let set = || vcpu.set_vcpu_events(&events);
    timed(samples, "set-vcpu-events", set, "KVM_SET_VCPU_EVENTS")
}
