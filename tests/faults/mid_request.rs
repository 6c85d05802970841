//! A device that waits for a page of a request: a vCPU that no signal gets out of there.

use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use forkvm::engine::{ForkError, Member, MemberError, Phase};
use forkvm::vmm::PausedVm;
use forkvm::{CloneSpec, DiskSource, End, FaultConfig, FreezeKind, MemoryMode};
use vm_memory::{Bytes, GuestAddress};

use crate::common::{Guest, LONG, Setup, expect_end, fork_by, need_kvm};
use crate::family::{PAGE, SOON, expect_lost, impatient};
use crate::switch::{Manner, Switch};

/// Of the pause that fails.
const PAUSE: Duration = Duration::from_millis(200);

/// The data of the write request that stands in the queue of the one disk: whole pages that hold
/// nothing else.
fn data_in_queue(paused: &PausedVm<'_>) -> Option<Range<u64>> {
    let ram = paused.ram();
    let read = |at: u64| -> u64 { ram.guest().read_obj(GuestAddress(at)).unwrap_or(0) };
    let populated = ram.populated().unwrap();
    let pages = populated
        .into_iter()
        .flat_map(|run| run.step_by(PAGE as usize));
    // The first descriptor is the request's header, in the page of the queue itself: 16 bytes, and
    // the next one follows (virtio 1.2, section 2.7.5).
    let is_queue = |page: &u64| {
        let (header, len_flags) = (read(*page), read(page + 8));
        (*page..page + PAGE).contains(&header) && len_flags & 0xffff_ffff_ffff == 16 | 1 << 32
    };
    let queue = pages.into_iter().find(is_queue)?;
    let (data, len) = (read(queue + 16), read(queue + 24) & 0xffff_ffff);
    let inner = data.next_multiple_of(PAGE)..(data + len) / PAGE * PAGE;
    (!inner.is_empty()).then_some(inner)
}

/// A guest that forks itself with a request in the queue, and whose clone cannot have the data of
/// that request: its device waits.
fn clone_in_request(page_deadline: Duration) -> (Guest, Switch, Arc<Member>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.raw");
    let disk = std::fs::File::create(&path).unwrap();
    disk.set_len(1 << 20).unwrap();
    let disk =
        forkvm::devices::block::RawFile::open(&path, forkvm::devices::block::Access::ReadOnly);
    let switch = Switch::new();
    let (found, stalls) = (Arc::new(Mutex::new(None)), switch.clone());
    let vm = Setup::new("job=blk-verify mib=1 n=1 seed=3")
        .memory_mib(32)
        .disk(DiskSource::volatile(Arc::new(disk.unwrap())))
        .faults(FaultConfig {
            chunk: PAGE,
            background: None,
            page_deadline,
            ..FaultConfig::default()
        })
        .sources(switch.clone())
        .guest_forks(fork_by(FreezeKind::WriteProtect, MemoryMode::Lazy, 1))
        .hook(move |phase, paused| {
            if let (Phase::Save, Some(paused)) = (phase, paused) {
                *found.lock().unwrap() = data_in_queue(paused);
            }
            if phase == Phase::Memory
                && let Some(data) = found.lock().unwrap().take()
            {
                stalls.set(data, Manner::Stall);
            }
            Ok(())
        })
        .boot();
    switch.wait_stalled();
    let clone = vm.log.clones().remove(0);
    (vm, switch, clone)
}

fn expect_pause_fails(clone: &Member, spec: CloneSpec) {
    let asked = Instant::now();
    let refused = clone.fork(spec).err().unwrap();
    let MemberError::Fork(ForkError::Pause(why)) = &refused else {
        panic!("{refused:?}");
    };
    assert!(
        why.to_string().contains("a page that does not come"),
        "{why}"
    );
    assert!(asked.elapsed() < PAUSE + SOON, "{:?}", asked.elapsed());
}

#[test]
fn a_pause_of_a_vm_whose_disk_waits_for_a_page_fails_by_its_deadline_and_the_vm_is_intact() {
    need_kvm!();
    let (vm, switch, clone) = clone_in_request(LONG);
    for _ in 0..2 {
        expect_pause_fails(&clone, impatient(FreezeKind::Delta, PAUSE));
        thread::sleep(Duration::from_millis(5));
    }
    switch.set_all(Manner::Near);
    // It has verified every sector, those of that request included, and so has its parent.
    expect_end(&vm, &clone, End::Exited(0));
    expect_end(&vm, vm.member(), End::Exited(0));
}

#[test]
fn a_vm_whose_disk_waits_for_a_page_that_never_comes_ends_with_the_reason() {
    need_kvm!();
    let deadline = Duration::from_millis(600);
    let (vm, switch, clone) = clone_in_request(deadline);
    let asked = Instant::now();
    expect_pause_fails(&clone, impatient(FreezeKind::Delta, PAUSE));
    expect_lost(&clone, asked + deadline + SOON, "no answer");
    // The status of a clone that failed is what its parent's JOIN answers.
    expect_end(&vm, vm.member(), End::Exited(255));
    switch.set_all(Manner::Near);
}

#[test]
fn a_vm_whose_disk_waits_for_a_page_can_be_killed() {
    need_kvm!();
    let (vm, switch, clone) = clone_in_request(LONG);
    let killed = Instant::now();
    clone.kill();
    expect_end(&vm, &clone, End::Killed);
    assert!(killed.elapsed() < 2 * SOON, "{:?}", killed.elapsed());
    switch.set_all(Manner::Near);
    expect_end(&vm, vm.member(), End::Exited(137));
}
