//! A device that waits for a page of a request: a vCPU that no signal gets out of there.

use std::fs::File;
use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use forkvm::devices::block::{Access, RawFile};
use forkvm::engine::{Member, Observer, Phase, Vetoed};
use forkvm::vmm::PausedVm;
use forkvm::{CloneSpec, DiskSource, End, FaultConfig, ForkPoint, FreezeKind, MemoryMode};
use vm_memory::{Bytes, GuestAddress};

use crate::common::switch::{Manner, Switch};
use crate::common::{Guest, LONG, Setup, expect_end, fork_by, need_kvm, with_causes};
use crate::family::{PAGE, SOON, expect_lost, impatient};

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

/// Has the source stall on the request's data as soon as the clone is made, and holds the parent in
/// its fork call: what it wrote afterwards would bring the data.
struct Holding {
    switch: Switch,
    data: Mutex<Option<Range<u64>>>,
    clone: Mutex<Sender<Arc<Member>>>,
    go_on: Mutex<Receiver<()>>,
}

impl Observer for Holding {
    fn enter(&self, phase: Phase, paused: Option<&PausedVm<'_>>) -> Result<(), Vetoed> {
        match (phase, paused) {
            (Phase::Save, Some(paused)) => *self.data.lock().unwrap() = data_in_queue(paused),
            // The pages that the clone begins with are in the image by now.
            (Phase::Memory, _) => {
                let data = self.data.lock().unwrap().take();
                self.switch
                    .set(data.expect("a request with data"), Manner::Stall);
            }
            _ => {}
        }
        Ok(())
    }

    fn leave(&self, _phase: Phase, _took: Duration) {}

    fn parent_paused(&self, _took: Duration) {}

    fn forked(&self, _point: &Arc<ForkPoint>, clones: &[Arc<Member>]) {
        self.clone.lock().unwrap().send(clones[0].clone()).unwrap();
        // Until the test lets it go, or is over.
        self.go_on.lock().unwrap().recv().unwrap_or_default();
    }
}

/// A guest that forks itself with a request in the queue, and its clone, which cannot have the data
/// of that request: its device waits.
struct InRequest {
    /// Before the VM, which is waited for when it is dropped.
    go_on: Sender<()>,
    switch: Switch,
    clone: Arc<Member>,
    vm: Guest,
    _folder: tempfile::TempDir,
}

impl InRequest {
    fn new(page_deadline: Duration) -> InRequest {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.raw");
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        let disk = RawFile::open(&path, Access::ReadOnly).unwrap();
        let switch = Switch::new();
        let ((clone, cloned), (go_on, held)) = (channel(), channel());
        let vm = Setup::new("job=blk-verify mib=1 n=1 seed=3")
            .memory_mib(32)
            .disk(DiskSource::volatile(Arc::new(disk)))
            .faults(FaultConfig {
                chunk: PAGE,
                background: None,
                page_deadline,
                ..FaultConfig::default()
            })
            .sources(switch.clone())
            .guest_forks(fork_by(FreezeKind::WriteProtect, MemoryMode::Lazy, 1))
            .observer(Holding {
                switch: switch.clone(),
                data: Mutex::default(),
                clone: Mutex::new(clone),
                go_on: Mutex::new(held),
            })
            .boot();
        let clone = cloned.recv_timeout(LONG).unwrap();
        switch.wait_stalled();
        InRequest {
            go_on,
            switch,
            clone,
            vm,
            _folder: folder,
        }
    }

    /// Lets the source deliver and the parent go on.
    fn relieve(&self) {
        self.switch.set_all(Manner::Near);
        self.go_on.send(()).unwrap();
    }
}

fn expect_pause_fails(clone: &Member, spec: CloneSpec) {
    let asked = Instant::now();
    let stood = clone.fork(spec);
    let refused = stood
        .err()
        .expect("a vCPU that waits in a device cannot stand still");
    let text = with_causes(&refused);
    assert!(
        text.contains("phase pause") && text.contains("a page that does not come"),
        "{text}"
    );
    assert!(asked.elapsed() < PAUSE + SOON, "{:?}", asked.elapsed());
}

#[test]
fn a_pause_of_a_vm_whose_disk_waits_for_a_page_fails_by_its_deadline_and_the_vm_is_intact() {
    need_kvm!();
    let guests = InRequest::new(LONG);
    for _ in 0..3 {
        expect_pause_fails(&guests.clone, impatient(FreezeKind::Delta, PAUSE));
    }
    guests.relieve();
    // It has verified every sector, those of that request included, and so has its parent.
    expect_end(&guests.vm, &guests.clone, End::Exited(0));
    expect_end(&guests.vm, guests.vm.member(), End::Exited(0));
}

#[test]
fn a_vm_whose_disk_waits_for_a_page_that_never_comes_ends_with_the_reason() {
    need_kvm!();
    let deadline = Duration::from_millis(600);
    let guests = InRequest::new(deadline);
    let asked = Instant::now();
    expect_pause_fails(&guests.clone, impatient(FreezeKind::Delta, PAUSE));
    expect_lost(&guests.clone, asked + deadline + SOON, "no answer");
    guests.relieve();
    // The status of a clone that failed is what its parent's JOIN answers.
    expect_end(&guests.vm, guests.vm.member(), End::Exited(255));
}

#[test]
fn a_vm_whose_disk_waits_for_a_page_can_be_killed() {
    need_kvm!();
    let guests = InRequest::new(LONG);
    let killed = Instant::now();
    guests.clone.kill();
    expect_end(&guests.vm, &guests.clone, End::Killed);
    assert!(killed.elapsed() < 2 * SOON, "{:?}", killed.elapsed());
    guests.relieve();
    expect_end(&guests.vm, guests.vm.member(), End::Exited(137));
}
