//! A fork that fails leaves nothing behind, whichever phase fails, and the parent runs on.
//!
//! An observer fails each phase of [`Phase::ALL`] in turn, and the phases that each clone goes
//! through also at the second clone. What the process holds is compared before and after; the guest
//! then verifies itself, and is forked again with success.
//!
//! Before the parent has resumed, all is put back, its disks included. After that the parent stays
//! where the freeze has put it, in a private mapping and on an overlay beside its disk, with a mark
//! that says so: it has run on, and what it wrote there counts. A parent that its images only watch
//! stays in the mapping that it had, and is not watched any more.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use forkvm::abi::doorbell::report;
use forkvm::abi::errno;
use forkvm::devices::block::{Access, RawFile};
use forkvm::engine::{ForkError, MemberError, Phase, Vetoed};
use forkvm::vmm::PausedVm;
use forkvm::{CloneSpec, DiskSource, End, Error, FreezeKind, MemoryMode};

use crate::alone;
use crate::census::{Census, expect_again, settled, stable};
use crate::common::{
    Guest, LONG, Setup, expect_end, expect_oracle_ok, finish_oracle, fork_by, need_kvm,
};

/// Where a fork fails: at the `time`th beginning of `phase`.
#[derive(Clone, Copy, Debug)]
struct Failure {
    phase: Phase,
    time: u32,
}

/// Phases that each clone goes through by itself.
const OF_EACH_CLONE: [Phase; 4] = [Phase::Spawn, Phase::Memory, Phase::Restore, Phase::Identity];

fn failures() -> Vec<Failure> {
    let first = Phase::ALL.map(|phase| Failure { phase, time: 1 });
    let second = OF_EACH_CLONE.map(|phase| Failure { phase, time: 2 });
    first.into_iter().chain(second).collect()
}

impl Failure {
    /// Whether the parent has run on by then.
    fn is_after_resume(self) -> bool {
        self.phase > Phase::Resume
    }
}

/// Fails once, when it is armed.
#[derive(Clone, Default)]
struct Saboteur(Arc<Mutex<Option<Failure>>>);

impl Saboteur {
    fn arm(&self, failure: Failure) {
        *self.0.lock().unwrap() = Some(failure);
    }

    fn enter(&self, phase: Phase) -> Result<(), Vetoed> {
        let mut armed = self.0.lock().unwrap();
        let Some(failure) = armed.as_mut().filter(|failure| failure.phase == phase) else {
            return Ok(());
        };
        failure.time -= 1;
        if failure.time > 0 {
            return Ok(());
        }
        *armed = None;
        Err(Vetoed(format!("sabotage of phase {phase}")))
    }
}

/// A raw disk in a folder of its own.
struct RawDisk {
    folder: tempfile::TempDir,
    path: PathBuf,
}

impl RawDisk {
    fn new() -> RawDisk {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.raw");
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        RawDisk { folder, path }
    }

    fn source(&self) -> DiskSource {
        DiskSource::Raw(Arc::new(
            RawFile::open(&self.path, Access::ReadWrite).unwrap(),
        ))
    }
}

/// What is compared: all of it as long as the parent has not run on.
fn census(failure: Failure, disk: &RawDisk) -> Census {
    let census = Census::take(disk.folder.path());
    if failure.is_after_resume() {
        census.of_parent_that_ran_on(&disk.path)
    } else {
        census
    }
}

/// `forks` have succeeded before. The guest writes nothing to its disk, so no fork stacks an overlay
/// on the first one.
fn expect_disk_files(failure: Failure, forks: u32, folder: &Path) {
    let was_frozen = forks > 0 || failure.is_after_resume();
    let census = Census::take(folder);
    let names: BTreeSet<_> = census.files().collect();
    assert_eq!(
        names.contains("disk.raw.forkvm-base"),
        was_frozen,
        "{names:?}"
    );
    assert_eq!(
        names.contains("disk.raw.overlay-1"),
        was_frozen,
        "{names:?}"
    );
    assert!(
        names.iter().all(|name| !name.contains("overlay-2")),
        "{names:?}"
    );
}

/// An oracle with a raw disk, halted, so that what it holds changes by forks only.
fn idle_oracle(disk: &RawDisk, saboteur: &Saboteur) -> Guest {
    let saboteur = saboteur.clone();
    // Its copier would start, and hold images, at moments of its own.
    let vm = Setup::new("job=oracle mib=1")
        .no_copier()
        .vcpus(2)
        .disk(disk.source())
        .hook(move |phase, _| saboteur.enter(phase))
        .boot();
    vm.wait_ready(LONG).unwrap();
    vm
}

/// A kind of fork of a VM that may have been forked before, which brings it where that kind can be
/// had, and the process where it has the threads and descriptors of its fault handler.
#[derive(Clone, Copy, Debug)]
struct Way {
    before: Option<(FreezeKind, MemoryMode)>,
    freeze: FreezeKind,
    mode: MemoryMode,
}

fn host_fork_fails(way: Way, failure: Failure) {
    let (disk, saboteur) = (RawDisk::new(), Saboteur::default());
    let vm = idle_oracle(&disk, &saboteur);
    let what = format!("{way:?} {failure:?}");
    let mut forks = 0;
    if let Some((freeze, mode)) = way.before {
        forks += 1;
        drop(vm.fork_point(fork_by(freeze, mode, 1)).unwrap());
        expect_oracle_ok(&vm, vm.member(), forks);
        if mode == MemoryMode::Cow {
            // Whoever fails below has a fault handler that is already there.
            forks += 1;
            let delta = fork_by(FreezeKind::Delta, MemoryMode::Lazy, 1);
            drop(vm.fork_point(delta).unwrap());
            expect_oracle_ok(&vm, vm.member(), forks);
        }
    }
    let spec = fork_by(way.freeze, way.mode, 2);

    let before = stable(|| census(failure, &disk));
    saboteur.arm(failure);
    let error = vm
        .fork(spec)
        .err()
        .unwrap_or_else(|| panic!("{what} did not fail"));
    let Error::Member(MemberError::Fork(error)) = error else {
        panic!("{what}: {error:?}")
    };
    assert!(
        said(&error).contains(&format!("sabotage of phase {}", failure.phase)),
        "{error:?}"
    );
    expect_again(&before, || census(failure, &disk), &what);
    expect_disk_files(failure, forks, disk.folder.path());
    assert!(vm.log.clones().is_empty());

    let again = fork_by(FreezeKind::Auto, way.mode, 2);
    let clones = vm.fork(again).unwrap();
    for clone in &clones {
        expect_end(&vm, clone.member(), End::Exited(0));
    }
    // The count says that the fork that failed was none, or that the guest was told of it: the
    // guest verifies itself at each change.
    expect_oracle_ok(&vm, vm.member(), vm.identity().fork_count);
    finish_oracle(&vm, vm.member());
}

/// An error with its causes.
fn said(error: &ForkError) -> String {
    let causes = std::iter::successors(Some(error as &dyn std::error::Error), |e| e.source());
    causes
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ")
}

fn guest_fork_fails(failure: Failure) {
    let (disk, saboteur) = (Arc::new(RawDisk::new()), Saboteur::default());
    let what = format!("guest's fork, {failure:?}");
    // Taken when the guest asks, first and again: its only running vCPU waits both times.
    let [before, after] = [(); 2].map(|()| Arc::new(Mutex::new(None::<Census>)));
    let asked = AtomicU32::new(0);
    saboteur.arm(failure);
    let hook = {
        let (disk, before, after) = (disk.clone(), before.clone(), after.clone());
        move |phase, _: Option<&PausedVm<'_>>| {
            if phase == Phase::Request {
                let mut before = before.lock().unwrap();
                if asked.fetch_add(1, Ordering::Relaxed) == 0 {
                    *before = Some(census(failure, &disk));
                } else {
                    let again = settled(before.as_ref(), || census(failure, &disk));
                    *after.lock().unwrap() = Some(again);
                }
            }
            saboteur.enter(phase)
        }
    };
    let setup = Setup::new("job=fork n=2 mib=1 tries=2")
        .no_copier()
        .vcpus(2)
        .disk(disk.source());
    let vm = setup.hook(hook).boot();
    let refusal = report::USER + errno::EIO as u32;
    vm.member().wait_report(refusal, 1, LONG).unwrap();
    expect_end(&vm, vm.member(), End::Exited(2));
    let clones = vm.log.clones();
    assert_eq!(clones.len(), 2, "{what}");
    for (id, clone) in (1..).zip(&clones) {
        expect_end(&vm, clone, End::Exited(id));
    }
    assert!(before.lock().unwrap().is_some());
    assert_eq!(*before.lock().unwrap(), *after.lock().unwrap(), "{what}");
}

fn every_failure(way: Way) {
    need_kvm!();
    let _turn = alone();
    failures()
        .into_iter()
        .for_each(|failure| host_fork_fails(way, failure));
}

/// Of a VM that was never forked before, by a freeze that gives whole images.
fn every_failure_of_a_hosts_fork(freeze: FreezeKind) {
    every_failure(Way {
        before: None,
        freeze,
        mode: MemoryMode::Cow,
    });
}

/// Of a VM that was remapped before.
fn every_failure_of_a_delta(mode: MemoryMode) {
    every_failure(Way {
        before: Some((FreezeKind::Remap, MemoryMode::Cow)),
        freeze: FreezeKind::Delta,
        mode,
    });
}

#[test]
fn a_fork_by_remap_that_fails_at_any_phase_leaves_nothing_and_the_parent_runs_on() {
    every_failure_of_a_hosts_fork(FreezeKind::Remap);
}

#[test]
fn a_fork_by_copy_that_fails_at_any_phase_leaves_nothing_and_the_parent_runs_on() {
    every_failure_of_a_hosts_fork(FreezeKind::Copy);
}

#[test]
fn a_stop_that_fails_at_any_phase_leaves_nothing_and_the_parent_runs_on() {
    every_failure_of_a_hosts_fork(FreezeKind::Stop);
}

/// Of a VM whose memory is private: images are fed by it then, and it was to stand still.
fn every_failure_of_a_stop_after_a_remap(mode: MemoryMode) {
    every_failure(Way {
        before: Some((FreezeKind::Remap, MemoryMode::Cow)),
        freeze: FreezeKind::Stop,
        mode,
    });
}

#[test]
fn a_stop_of_private_memory_for_lazy_clones_that_fails_at_any_phase_leaves_nothing_and_the_parent_runs_on()
 {
    every_failure_of_a_stop_after_a_remap(MemoryMode::Lazy);
}

#[test]
fn a_stop_of_private_memory_for_whole_clones_that_fails_at_any_phase_leaves_nothing_and_the_parent_runs_on()
 {
    every_failure_of_a_stop_after_a_remap(MemoryMode::Cow);
}

#[test]
fn a_fork_by_write_protect_that_fails_at_any_phase_leaves_nothing_and_the_parent_runs_on() {
    every_failure(Way {
        before: Some((FreezeKind::WriteProtect, MemoryMode::Lazy)),
        freeze: FreezeKind::WriteProtect,
        mode: MemoryMode::Lazy,
    });
}

#[test]
fn a_fork_by_delta_into_lazy_clones_that_fails_at_any_phase_leaves_nothing_and_the_parent_runs_on()
{
    every_failure_of_a_delta(MemoryMode::Lazy);
}

#[test]
fn a_fork_by_delta_into_whole_clones_that_fails_at_any_phase_leaves_nothing_and_the_parent_runs_on()
{
    every_failure_of_a_delta(MemoryMode::Cow);
}

#[test]
fn a_guests_fork_that_fails_at_any_phase_leaves_nothing_and_the_guest_runs_on() {
    need_kvm!();
    let _turn = alone();
    failures().into_iter().for_each(guest_fork_fails);
}

#[test]
fn a_spawn_from_a_fork_point_that_fails_leaves_nothing_and_a_later_one_succeeds() {
    need_kvm!();
    let _turn = alone();
    let (disk, saboteur) = (RawDisk::new(), Saboteur::default());
    let vm = idle_oracle(&disk, &saboteur);
    let point = vm.fork_point(CloneSpec::new(2)).unwrap();
    expect_oracle_ok(&vm, vm.member(), 1);
    for failure in failures() {
        let is_of_spawn = OF_EACH_CLONE.contains(&failure.phase) || failure.phase == Phase::Run;
        if !is_of_spawn {
            continue;
        }
        let before = Census::take(disk.folder.path());
        saboteur.arm(failure);
        assert!(point.spawn(2).is_err(), "{failure:?}");
        let take = || Census::take(disk.folder.path());
        expect_again(&before, take, &format!("spawn, {failure:?}"));
    }
    let clones = point.spawn(2).unwrap();
    clones
        .iter()
        .for_each(|clone| expect_end(&vm, clone, End::Exited(0)));
    finish_oracle(&vm, vm.member());
}
