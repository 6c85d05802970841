//! A VM is forked by its host, at any moment and in every way; the guest is an oracle that knows
//! what every page, counter, register and sector must be, and which interrupt is due. Parent and
//! clones verify all of it afterwards; the parent of a `stop` has ended by then. So does a clone that
//! comes later, of a shell from the pool.
//!
//! One test per cell: `fork_matrix::FREEZE_VCPUS_LOAD` for a booted parent and clones that map
//! its memory copy-on-write from a whole image, and `fork_matrix::MODE_FREEZE_VCPUS_LOAD` for the
//! rest. Nothing is copied in the background: a lazy clone gets what its saved vCPUs name before it starts,
//! and then what it faults on, with what lies beside it or is about to follow. The parent of a delta, and of a stop with lazy clones, maps its memory privately, since it was forked before.

use std::thread;
use std::time::Duration;

use forkvm::abi::{HIGH_RAM_START, LOW_RAM_END, TEST_GSI};
use forkvm::engine::{Phase, Ticket, Vetoed};
use forkvm::{CloneSpec, DiskSource, End, FreezeKind, MemoryMode};

use crate::common::{
    LONG, Setup, expect_end, expect_oracle_ok, finish_oracle, fork_by, need_kvm, scaled,
};
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

/// How the parent maps its memory when it is forked.
#[derive(Clone, Copy, PartialEq)]
enum Mapped {
    /// Shared: it was booted, and never forked.
    Shared,
    /// Privately: its first fork was a remap.
    Privately,
}

/// A kind of fork.
#[derive(Clone, Copy)]
struct Way {
    parent: Mapped,
    freeze: FreezeKind,
    mode: MemoryMode,
}

const fn way(parent: Mapped, mode: MemoryMode, freeze: FreezeKind) -> Way {
    Way {
        parent,
        freeze,
        mode,
    }
}

fn check(way: Way, vcpus: u32, memory_mib: u64, load: Load) {
    need_kvm!();
    assert!(way.freeze.serves().contains(&way.mode));
    let on = |wanted| u8::from(load == wanted);
    let job = format!(
        "job=oracle mib={} writers={} disk={} irq={}",
        scaled(8, 1),
        on(Load::HotWriter),
        on(Load::DiskInFlight),
        on(Load::InterruptPending),
    );
    let mut setup = Setup::new(job)
        .vcpus(vcpus)
        .memory_mib(memory_mib)
        .no_copier();
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
    vm.wait_ready(LONG).unwrap();
    let mut forks = 0;
    if way.parent == Mapped::Privately {
        let remap = CloneSpec {
            freeze: FreezeKind::Remap,
            ..CloneSpec::new(1)
        };
        drop(vm.fork_point(remap).unwrap());
        forks += 1;
        expect_oracle_ok(&vm, vm.member(), forks);
    }
    if matches!(load, Load::HotWriter | Load::DiskInFlight) {
        // Into the middle of the work.
        thread::sleep(Duration::from_millis(3));
    }
    let spec = fork_by(way.freeze, way.mode, CLONES);
    let Ticket { clones, point, .. } = vm.member().fork(spec).unwrap();
    forks += 1;
    assert_eq!(clones.len(), CLONES as usize);
    for clone in &clones {
        expect_end(&vm, clone, End::Exited(0));
    }
    if way.freeze == FreezeKind::Stop {
        expect_end(&vm, vm.member(), End::Stopped);
    } else {
        expect_oracle_ok(&vm, vm.member(), forks);
        finish_oracle(&vm, vm.member());
    }
    assert!(point.fill_pool(1).unwrap() >= 1);
    let late = point.spawn(1).unwrap().remove(0);
    expect_end(&vm, &late, End::Exited(0));
}

const REMAP: Way = way(Mapped::Shared, MemoryMode::Cow, FreezeKind::Remap);
const STOP: Way = way(Mapped::Shared, MemoryMode::Cow, FreezeKind::Stop);
const COPY: Way = way(Mapped::Shared, MemoryMode::Cow, FreezeKind::Copy);
const COW_DELTA: Way = way(Mapped::Privately, MemoryMode::Cow, FreezeKind::Delta);
const LAZY_WRITE_PROTECT: Way = way(Mapped::Shared, MemoryMode::Lazy, FreezeKind::WriteProtect);
const LAZY_DELTA: Way = way(Mapped::Privately, MemoryMode::Lazy, FreezeKind::Delta);
const LAZY_STOP: Way = way(Mapped::Privately, MemoryMode::Lazy, FreezeKind::Stop);

macro_rules! cells {
    ($($name:ident: $way:ident $vcpus:literal $load:ident;)*) => {$(
        #[test]
        fn $name() {
            check($way, $vcpus, 64, Load::$load);
        }
    )*};
}

cells! {
    remap_1vcpu_idle: REMAP 1 Idle;
    remap_2vcpu_idle: REMAP 2 Idle;
    remap_4vcpu_idle: REMAP 4 Idle;
    remap_1vcpu_hot_writer: REMAP 1 HotWriter;
    remap_2vcpu_hot_writer: REMAP 2 HotWriter;
    remap_4vcpu_hot_writer: REMAP 4 HotWriter;
    remap_1vcpu_disk_in_flight: REMAP 1 DiskInFlight;
    remap_2vcpu_disk_in_flight: REMAP 2 DiskInFlight;
    remap_4vcpu_disk_in_flight: REMAP 4 DiskInFlight;
    remap_1vcpu_interrupt_pending: REMAP 1 InterruptPending;
    remap_2vcpu_interrupt_pending: REMAP 2 InterruptPending;
    remap_4vcpu_interrupt_pending: REMAP 4 InterruptPending;
    stop_1vcpu_idle: STOP 1 Idle;
    stop_2vcpu_idle: STOP 2 Idle;
    stop_4vcpu_idle: STOP 4 Idle;
    stop_1vcpu_hot_writer: STOP 1 HotWriter;
    stop_2vcpu_hot_writer: STOP 2 HotWriter;
    stop_4vcpu_hot_writer: STOP 4 HotWriter;
    stop_1vcpu_disk_in_flight: STOP 1 DiskInFlight;
    stop_2vcpu_disk_in_flight: STOP 2 DiskInFlight;
    stop_4vcpu_disk_in_flight: STOP 4 DiskInFlight;
    stop_1vcpu_interrupt_pending: STOP 1 InterruptPending;
    stop_2vcpu_interrupt_pending: STOP 2 InterruptPending;
    stop_4vcpu_interrupt_pending: STOP 4 InterruptPending;
    copy_1vcpu_idle: COPY 1 Idle;
    copy_2vcpu_idle: COPY 2 Idle;
    copy_4vcpu_idle: COPY 4 Idle;
    copy_1vcpu_hot_writer: COPY 1 HotWriter;
    copy_2vcpu_hot_writer: COPY 2 HotWriter;
    copy_4vcpu_hot_writer: COPY 4 HotWriter;
    copy_1vcpu_disk_in_flight: COPY 1 DiskInFlight;
    copy_2vcpu_disk_in_flight: COPY 2 DiskInFlight;
    copy_4vcpu_disk_in_flight: COPY 4 DiskInFlight;
    copy_1vcpu_interrupt_pending: COPY 1 InterruptPending;
    copy_2vcpu_interrupt_pending: COPY 2 InterruptPending;
    copy_4vcpu_interrupt_pending: COPY 4 InterruptPending;
    cow_delta_1vcpu_idle: COW_DELTA 1 Idle;
    cow_delta_2vcpu_idle: COW_DELTA 2 Idle;
    cow_delta_4vcpu_idle: COW_DELTA 4 Idle;
    cow_delta_1vcpu_hot_writer: COW_DELTA 1 HotWriter;
    cow_delta_2vcpu_hot_writer: COW_DELTA 2 HotWriter;
    cow_delta_4vcpu_hot_writer: COW_DELTA 4 HotWriter;
    cow_delta_1vcpu_disk_in_flight: COW_DELTA 1 DiskInFlight;
    cow_delta_2vcpu_disk_in_flight: COW_DELTA 2 DiskInFlight;
    cow_delta_4vcpu_disk_in_flight: COW_DELTA 4 DiskInFlight;
    cow_delta_1vcpu_interrupt_pending: COW_DELTA 1 InterruptPending;
    cow_delta_2vcpu_interrupt_pending: COW_DELTA 2 InterruptPending;
    cow_delta_4vcpu_interrupt_pending: COW_DELTA 4 InterruptPending;
    lazy_write_protect_1vcpu_idle: LAZY_WRITE_PROTECT 1 Idle;
    lazy_write_protect_2vcpu_idle: LAZY_WRITE_PROTECT 2 Idle;
    lazy_write_protect_4vcpu_idle: LAZY_WRITE_PROTECT 4 Idle;
    lazy_write_protect_1vcpu_hot_writer: LAZY_WRITE_PROTECT 1 HotWriter;
    lazy_write_protect_2vcpu_hot_writer: LAZY_WRITE_PROTECT 2 HotWriter;
    lazy_write_protect_4vcpu_hot_writer: LAZY_WRITE_PROTECT 4 HotWriter;
    lazy_write_protect_1vcpu_disk_in_flight: LAZY_WRITE_PROTECT 1 DiskInFlight;
    lazy_write_protect_2vcpu_disk_in_flight: LAZY_WRITE_PROTECT 2 DiskInFlight;
    lazy_write_protect_4vcpu_disk_in_flight: LAZY_WRITE_PROTECT 4 DiskInFlight;
    lazy_write_protect_1vcpu_interrupt_pending: LAZY_WRITE_PROTECT 1 InterruptPending;
    lazy_write_protect_2vcpu_interrupt_pending: LAZY_WRITE_PROTECT 2 InterruptPending;
    lazy_write_protect_4vcpu_interrupt_pending: LAZY_WRITE_PROTECT 4 InterruptPending;
    lazy_delta_1vcpu_idle: LAZY_DELTA 1 Idle;
    lazy_delta_2vcpu_idle: LAZY_DELTA 2 Idle;
    lazy_delta_4vcpu_idle: LAZY_DELTA 4 Idle;
    lazy_delta_1vcpu_hot_writer: LAZY_DELTA 1 HotWriter;
    lazy_delta_2vcpu_hot_writer: LAZY_DELTA 2 HotWriter;
    lazy_delta_4vcpu_hot_writer: LAZY_DELTA 4 HotWriter;
    lazy_delta_1vcpu_disk_in_flight: LAZY_DELTA 1 DiskInFlight;
    lazy_delta_2vcpu_disk_in_flight: LAZY_DELTA 2 DiskInFlight;
    lazy_delta_4vcpu_disk_in_flight: LAZY_DELTA 4 DiskInFlight;
    lazy_delta_1vcpu_interrupt_pending: LAZY_DELTA 1 InterruptPending;
    lazy_delta_2vcpu_interrupt_pending: LAZY_DELTA 2 InterruptPending;
    lazy_delta_4vcpu_interrupt_pending: LAZY_DELTA 4 InterruptPending;
    lazy_stop_1vcpu_idle: LAZY_STOP 1 Idle;
    lazy_stop_2vcpu_idle: LAZY_STOP 2 Idle;
    lazy_stop_4vcpu_idle: LAZY_STOP 4 Idle;
    lazy_stop_1vcpu_hot_writer: LAZY_STOP 1 HotWriter;
    lazy_stop_2vcpu_hot_writer: LAZY_STOP 2 HotWriter;
    lazy_stop_4vcpu_hot_writer: LAZY_STOP 4 HotWriter;
    lazy_stop_1vcpu_disk_in_flight: LAZY_STOP 1 DiskInFlight;
    lazy_stop_2vcpu_disk_in_flight: LAZY_STOP 2 DiskInFlight;
    lazy_stop_4vcpu_disk_in_flight: LAZY_STOP 4 DiskInFlight;
    lazy_stop_1vcpu_interrupt_pending: LAZY_STOP 1 InterruptPending;
    lazy_stop_2vcpu_interrupt_pending: LAZY_STOP 2 InterruptPending;
    lazy_stop_4vcpu_interrupt_pending: LAZY_STOP 4 InterruptPending;
}

/// RAM on both sides of the hole below 4 GiB.
#[test]
fn remap_2vcpu_hot_writer_6gib() {
    check(REMAP, 2, 6144, Load::HotWriter);
}

#[test]
fn lazy_write_protect_2vcpu_hot_writer_6gib() {
    check(LAZY_WRITE_PROTECT, 2, 6144, Load::HotWriter);
}

#[test]
fn lazy_delta_2vcpu_hot_writer_6gib() {
    check(LAZY_DELTA, 2, 6144, Load::HotWriter);
}

#[test]
fn the_guest_of_the_6gib_cell_uses_ram_above_4_gib() {
    need_kvm!();
    let vm = Setup::new("job=oracle mib=1").memory_mib(6144).boot();
    vm.wait_ready(LONG).unwrap();
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
