//! A VM is forked by its host, at any moment and in every way; the guest is an oracle that knows
//! what every page, counter, register and sector must be, and which interrupt is due. Parent and
//! clones verify all of it afterwards; the parent of a `stop` has ended by then.
//!
//! One test per cell: `fork_matrix::FREEZE_VCPUS_LOAD`.

use std::thread;
use std::time::Duration;

use forkvm::abi::{HIGH_RAM_START, LOW_RAM_END, TEST_GSI};
use forkvm::engine::{Phase, Vetoed};
use forkvm::{CloneSpec, DiskSource, End, FreezeKind};

use crate::common::{Setup, expect_end, expect_oracle_ok, finish_oracle, need_kvm, scaled};
use crate::disks::zeroed_disk;

/// What the guest is doing when it is forked.
#[derive(Clone, Copy, PartialEq)]
enum Load {
    /// All vCPUs are halted.
    Idle,
    /// All vCPUs rewrite their pages.
    HotWriter,
    /// A vCPU writes to a disk.
    DiskInFlight,
    /// All vCPUs are halted, and an interrupt is raised between pause and save.
    InterruptPending,
}

const CLONES: u32 = 2;

fn check(freeze: FreezeKind, vcpus: u32, memory_mib: u64, load: Load) {
    need_kvm!();
    let on = |wanted| u8::from(load == wanted);
    let job = format!(
        "job=oracle mib={} writers={} disk={} irq={}",
        scaled(8, 1),
        on(Load::HotWriter),
        on(Load::DiskInFlight),
        on(Load::InterruptPending),
    );
    let mut setup = Setup::new(job).vcpus(vcpus).memory_mib(memory_mib);
    let folder = tempfile::tempdir().unwrap();
    if load == Load::DiskInFlight {
        setup = setup.disk(DiskSource::volatile(zeroed_disk(folder.path(), 1)));
    }
    if load == Load::InterruptPending {
        setup = setup.hook(|phase, paused| match paused {
            Some(paused) if phase == Phase::Save => paused
                .pulse(TEST_GSI)
                .map_err(|error| Vetoed(error.to_string())),
            _ => Ok(()),
        });
    }
    let vm = setup.boot();
    vm.wait_ready(crate::common::LONG).unwrap();
    if matches!(load, Load::HotWriter | Load::DiskInFlight) {
        // Into the middle of the work.
        thread::sleep(Duration::from_millis(3));
    }
    let spec = CloneSpec {
        freeze,
        ..CloneSpec::new(CLONES)
    };
    let clones = vm.fork(spec).unwrap();
    assert_eq!(clones.len(), CLONES as usize);
    for clone in &clones {
        expect_end(&vm, clone.member(), End::Exited(0));
    }
    if freeze == FreezeKind::Stop {
        expect_end(&vm, vm.member(), End::Stopped);
    } else {
        expect_oracle_ok(&vm, vm.member(), 1);
        finish_oracle(&vm, vm.member());
    }
}

macro_rules! cells {
    ($($name:ident: $freeze:ident $vcpus:literal $load:ident;)*) => {$(
        #[test]
        fn $name() {
            check(FreezeKind::$freeze, $vcpus, 64, Load::$load);
        }
    )*};
}

cells! {
    remap_1vcpu_idle: Remap 1 Idle;
    remap_2vcpu_idle: Remap 2 Idle;
    remap_4vcpu_idle: Remap 4 Idle;
    remap_1vcpu_hot_writer: Remap 1 HotWriter;
    remap_2vcpu_hot_writer: Remap 2 HotWriter;
    remap_4vcpu_hot_writer: Remap 4 HotWriter;
    remap_1vcpu_disk_in_flight: Remap 1 DiskInFlight;
    remap_2vcpu_disk_in_flight: Remap 2 DiskInFlight;
    remap_4vcpu_disk_in_flight: Remap 4 DiskInFlight;
    remap_1vcpu_interrupt_pending: Remap 1 InterruptPending;
    remap_2vcpu_interrupt_pending: Remap 2 InterruptPending;
    remap_4vcpu_interrupt_pending: Remap 4 InterruptPending;
    stop_1vcpu_idle: Stop 1 Idle;
    stop_2vcpu_idle: Stop 2 Idle;
    stop_4vcpu_idle: Stop 4 Idle;
    stop_1vcpu_hot_writer: Stop 1 HotWriter;
    stop_2vcpu_hot_writer: Stop 2 HotWriter;
    stop_4vcpu_hot_writer: Stop 4 HotWriter;
    stop_1vcpu_disk_in_flight: Stop 1 DiskInFlight;
    stop_2vcpu_disk_in_flight: Stop 2 DiskInFlight;
    stop_4vcpu_disk_in_flight: Stop 4 DiskInFlight;
    stop_1vcpu_interrupt_pending: Stop 1 InterruptPending;
    stop_2vcpu_interrupt_pending: Stop 2 InterruptPending;
    stop_4vcpu_interrupt_pending: Stop 4 InterruptPending;
    copy_1vcpu_idle: Copy 1 Idle;
    copy_2vcpu_idle: Copy 2 Idle;
    copy_4vcpu_idle: Copy 4 Idle;
    copy_1vcpu_hot_writer: Copy 1 HotWriter;
    copy_2vcpu_hot_writer: Copy 2 HotWriter;
    copy_4vcpu_hot_writer: Copy 4 HotWriter;
    copy_1vcpu_disk_in_flight: Copy 1 DiskInFlight;
    copy_2vcpu_disk_in_flight: Copy 2 DiskInFlight;
    copy_4vcpu_disk_in_flight: Copy 4 DiskInFlight;
    copy_1vcpu_interrupt_pending: Copy 1 InterruptPending;
    copy_2vcpu_interrupt_pending: Copy 2 InterruptPending;
    copy_4vcpu_interrupt_pending: Copy 4 InterruptPending;
}

/// RAM on both sides of the hole below 4 GiB.
#[test]
fn remap_2vcpu_hot_writer_6gib() {
    check(FreezeKind::Remap, 2, 6144, Load::HotWriter);
}

#[test]
fn the_guest_of_the_6gib_cell_uses_ram_above_4_gib() {
    need_kvm!();
    let vm = Setup::new("job=oracle mib=1").memory_mib(6144).boot();
    vm.wait_ready(crate::common::LONG).unwrap();
    let populated = vm.member().with_paused(|paused| {
        let high = paused.ram().layout().regions()[1].start;
        (high, paused.ram().populated().unwrap())
    });
    let (high, populated) = populated.unwrap();
    assert_eq!(high, HIGH_RAM_START);
    // Ranges are offsets in the file, where high RAM follows low RAM without a hole.
    assert!(
        populated.iter().any(|range| range.end > LOW_RAM_END),
        "{populated:?}"
    );
}
