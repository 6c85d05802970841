//! The demo itself: boots the guest that maps reads, lets it fork, and gathers what its clones
//! wrote and what it all cost.
//!
//! Every figure is read from where it happened: phases and end points from the engine's trace,
//! sectors from the devices' counters, memory from the kernel's accounts; none from the options.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use forkvm_abi::doorbell::report;
use forkvm_abi::records;
use forkvm_clone_engine::{
    BootSpec, CloneSpec, ConsoleDevice, DiskSource, DiskSpec, End, FamilyConfig, FaultFigures,
    Finished, ForkPoint, Member, Phase,
};
use forkvm_devices::block::{Access, RawFile, RawFileError, SECTOR};

use super::input::Input;
use super::observer::{DemoObserver, Fork, Growth};
use crate::{Error, Vm, guest};

/// The guest's report that the index is begun.
const INDEX_BEGUN: u32 = report::USER + 1;

/// How long the parent may take to read and index; a guest under emulation needs minutes.
const READY_DEADLINE: Duration = Duration::from_secs(600);

/// What to run.
#[derive(Clone)]
pub struct RunSpec {
    /// RAM of the parent in MiB.
    pub memory_mib: u64,
    /// vCPUs of the parent, and of each clone.
    pub vcpus: u32,
    /// Clones.
    pub clones: u32,
    /// How forks are done, by whomever; consoles and observer are put in. With
    /// `guest_forks_while_shared` the parent forks one clone like that, and that clone the others.
    pub family: FamilyConfig,
    /// Whether the host forks, rather than the guest.
    pub forked_by_host: bool,
    /// Where the consoles go.
    pub consoles: Arc<dyn forkvm_clone_engine::Consoles>,
}

/// What came of it.
pub struct Run {
    /// Where the clones came from.
    pub point: Arc<ForkPoint>,
    /// The clones, in the order of their shares.
    pub clones: Vec<Arc<Member>>,
    /// What is left of them, in the same order.
    pub finished: Vec<Finished>,
    /// The texts that they wrote, in the same order.
    pub shares: Vec<Vec<u8>>,
    /// Phases of the fork, as they ended.
    pub phases: Vec<(Phase, Duration)>,
    /// How long the parent stood still; `None` for one that was stopped.
    pub parent_pause: Option<Duration>,
    /// How long the guest took to build its index, if it said so.
    pub index_build: Option<Duration>,
    /// Memory that the clones took, at most.
    pub growth: Growth,
    /// What was fetched, by all clones of all forks.
    pub fetched: FaultFigures,
    /// What is wrong with how the clones worked, for people; empty if nothing is.
    pub failures: Vec<String>,
}

/// Runs the job on `input`.
pub fn run(input: &Input, spec: &RunSpec) -> Result<Run, RunError> {
    let depth = if spec.family.guest_forks_while_shared.is_some() {
        2
    } else {
        1
    };
    let observer = Arc::new(DemoObserver::before_boot(depth, &spec.family.spawner));
    let config = FamilyConfig {
        consoles: spec.consoles.clone(),
        observer: observer.clone(),
        ..spec.family.clone()
    };
    let by = if spec.forked_by_host { "host" } else { "guest" };
    let vm = Vm::boot_with(
        BootSpec {
            name: "demo".into(),
            memory_mib: spec.memory_mib,
            vcpus: spec.vcpus,
            disks: disks(input)?,
            payload: guest::bare(),
            cmdline: format!(
                "job=map-reads clones={} forked_by={by} depth={depth}",
                spec.clones
            ),
            console: ConsoleDevice::Serial,
        },
        config,
    )?;
    let ended = work(&vm, spec);
    vm.family().end();
    let parent = ended?;
    let growth = observer.growth();
    let mut forks = observer.take_forks();
    let Some(fork) = forks.pop().filter(|fork| fork.point.depth() == depth) else {
        return Err(RunError::NotForked { end: parent.end });
    };
    let finished: Vec<Finished> = fork.clones.iter().map(|clone| clone.wait()).collect();
    let mut shares = Vec::new();
    for (clone, finished) in fork.clones.iter().zip(&finished) {
        shares.push(read_records(clone, finished)?);
    }
    Ok(Run {
        failures: failures(spec, &parent, &forks, &fork.clones, &finished),
        index_build: index_build(vm.member()),
        fetched: vm.family().faults().figures(),
        parent_pause: fork.parent_pause,
        phases: fork.phases,
        growth,
        point: fork.point,
        clones: fork.clones,
        finished,
        shares,
    })
}

/// Disk 0 holds the references, disk 1 the reads; what is written to disk 2 ends with each VM.
fn disks(input: &Input) -> Result<Vec<DiskSpec>, RunError> {
    let open = |path: &PathBuf| RawFile::open(path, Access::ReadOnly).map(Arc::new);
    let spec = |name: &str, source| DiskSpec {
        name: name.into(),
        source,
    };
    Ok(vec![
        spec(
            "references",
            DiskSource::ReadOnly(open(&input.references_disk)?),
        ),
        spec("reads", DiskSource::ReadOnly(open(&input.reads_disk)?)),
        spec("records", DiskSource::volatile(open(&input.records_disk)?)),
    ])
}

/// Waits for the job: the parent's end, and its clones' if the parent does not join them.
fn work(vm: &Vm, spec: &RunSpec) -> Result<Finished, RunError> {
    if spec.forked_by_host {
        vm.wait_ready(READY_DEADLINE)?;
        let forks = &spec.family;
        let between = match &forks.guest_forks_while_shared {
            Some(first) => vm.fork(first.clone())?.pop(),
            None => None,
        };
        let forker = between.as_deref().unwrap_or(vm);
        let clones = forker.fork(CloneSpec {
            count: spec.clones,
            ..forks.guest_forks.clone()
        })?;
        clones.iter().for_each(|clone| drop(clone.join()));
    }
    let parent = vm.join();
    // A parent that was stopped at its fork point has joined nobody.
    vm.family()
        .running()
        .iter()
        .for_each(|clone| drop(clone.wait()));
    Ok(parent)
}

fn failures(
    spec: &RunSpec,
    parent: &Finished,
    earlier: &[Fork],
    clones: &[Arc<Member>],
    finished: &[Finished],
) -> Vec<String> {
    let mut failures = Vec::new();
    if !matches!(parent.end, End::Exited(0) | End::Stopped) {
        failures.push(format!("the parent {}", parent.end));
    }
    for clone in earlier.iter().flat_map(|fork| &fork.clones) {
        let end = clone.wait().end;
        if !matches!(end, End::Exited(0) | End::Stopped) {
            failures.push(format!(
                "clone {}, which forks the others, {end}",
                clone.name()
            ));
        }
    }
    if clones.len() != spec.clones as usize {
        failures.push(format!(
            "{} of {} clones were granted",
            clones.len(),
            spec.clones
        ));
    }
    for (clone, finished) in clones.iter().zip(finished) {
        if finished.end != End::Exited(0) {
            failures.push(format!("clone {} {}", clone.name(), finished.end));
        }
        // None are left of a clone whose process died.
        let references = finished.blk_counters.first();
        if references.is_some_and(|counters| counters.read_requests > 0) {
            let text = format!(
                "clone {} read the references instead of inheriting them",
                clone.name()
            );
            failures.push(text);
        }
    }
    failures
}

fn index_build(parent: &Member) -> Option<Duration> {
    let reports = parent.reports();
    let at = |value| {
        reports
            .iter()
            .find(|report| report.0 == value)
            .map(|report| report.1)
    };
    between(at(INDEX_BEGUN), at(report::READY))
}

/// Reads what a clone left on its disk 2 (`forkvm_abi::records`).
fn read_records(clone: &Member, finished: &Finished) -> Result<Vec<u8>, RunError> {
    let failed = |what: String| RunError::Records {
        clone: clone.name().to_owned(),
        what,
    };
    let Some(disk) = finished.disks.get(2) else {
        return Err(failed(format!("its disks are gone; it {}", finished.end)));
    };
    let mut header = [0; SECTOR as usize];
    disk.read_at(records::HEADER_SECTOR * SECTOR, &mut header)
        .map_err(|error| failed(error.to_string()))?;
    if header[..records::MAGIC.len()] != records::MAGIC {
        return Err(failed(format!("it has none; it {}", finished.end)));
    }
    let number = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().expect("8 bytes"));
    let len = number(records::LENGTH_OFFSET);
    let start = records::TEXT_SECTOR * SECTOR;
    if len > disk.len() - start {
        return Err(failed(format!("{len} bytes are more than the disk holds")));
    }
    let mut text = vec![0; (len as usize).next_multiple_of(SECTOR as usize)];
    disk.read_at(start, &mut text)
        .map_err(|error| failed(error.to_string()))?;
    text.truncate(len as usize);
    let lines = text.iter().filter(|&&byte| byte == b'\n').count() as u64;
    if lines != number(records::COUNT_OFFSET) {
        let count = number(records::COUNT_OFFSET);
        return Err(failed(format!("it says {count} records and holds {lines}")));
    }
    Ok(text)
}

/// Sum of the bytes that a VM read from its disks.
pub fn bytes_read(finished: &Finished) -> u64 {
    finished
        .blk_counters
        .iter()
        .map(|counters| counters.read_bytes)
        .sum()
}

/// Time from `start` until `end`, if both were seen.
pub fn between(start: Option<Instant>, end: Option<Instant>) -> Option<Duration> {
    Some(end?.saturating_duration_since(start?))
}

/// Why the job could not be run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A disk could not be opened.
    #[error(transparent)]
    Disk(#[from] RawFileError),
    /// A VM could not be booted or forked.
    #[error(transparent)]
    Vm(#[from] Error),
    /// The guest did not fork.
    #[error("the guest did not fork: it {end}; its console says why")]
    NotForked {
        /// How it ended.
        end: End,
    },
    /// A clone's records cannot be read.
    #[error("the records of clone {clone} cannot be read: {what}")]
    Records {
        /// Its name.
        clone: String,
        /// What is wrong.
        what: String,
    },
}
