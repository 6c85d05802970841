//! Rewinds that fail half-way: the clone ends with that reason, and nobody else notices.
//!
//! Both are failures that an embedder's own disk or source can bring about. With a fresh shell there is
//! no half-way: the other VM is complete before the old one is given up.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use forkvm::devices::block::{BlockLayer, Presence};
use forkvm::engine::{Break, Member, MemberError, RewindError, WorkingSetPolicy};
use forkvm::{DiskSource, End, FaultConfig, ForkPoint, FreezeKind, MemoryMode, RewindWay};

use crate::common::switch::{Manner, Switch};
use crate::common::{Guest, LONG, Obedient, Setup, fork_by, need_kvm};
use crate::ways;

const PAGES: u64 = 32;
const VALUE: u64 = 1_000_000;
const DISK: u64 = 1 << 20;

/// The ways that keep the clone's VM, so that its old life is given up before the new one is complete.
fn ways_in_the_same_vm() -> impl Iterator<Item = RewindWay> {
    ways()
        .into_iter()
        .filter(|way| *way != RewindWay::FreshShell)
}

type Act = Box<dyn FnOnce() + Send>;

/// A disk of the embedder's, whose size can change. It is asked for its size when a state is put back,
/// which is after the clone's pages were dropped.
#[derive(Clone)]
struct Elastic(Arc<Elasticity>);

struct Elasticity {
    len: AtomicU64,
    when_asked: Mutex<Option<Act>>,
}

impl Elastic {
    fn new() -> Elastic {
        Elastic(Arc::new(Elasticity {
            len: AtomicU64::new(DISK),
            when_asked: Mutex::default(),
        }))
    }

    fn resize(&self, len: u64) {
        self.0.len.store(len, Ordering::Relaxed);
    }

    /// Does `act` when it is asked for its size the next time, before it answers.
    fn when_asked(&self, act: impl FnOnce() + Send + 'static) {
        *self.0.when_asked.lock().unwrap() = Some(Box::new(act));
    }
}

impl BlockLayer for Elastic {
    fn len(&self) -> u64 {
        let act = self.0.when_asked.lock().unwrap().take();
        if let Some(act) = act {
            act();
        }
        self.0.len.load(Ordering::Relaxed)
    }

    fn read_only(&self) -> bool {
        true
    }

    fn read_at(&self, _offset: u64, data: &mut [u8]) -> io::Result<()> {
        data.fill(0);
        Ok(())
    }

    fn write_at(&self, _offset: u64, _data: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, _range: Range<u64>) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn presence(&self, offset: u64) -> io::Result<Presence> {
        Ok(Presence {
            present: true,
            len: self.0.len.load(Ordering::Relaxed) - offset,
        })
    }
}

/// A parent with known pages and such a disk, and a fork point of it whose clones get pages one by one,
/// by touch.
struct Origin {
    point: Arc<ForkPoint>,
    switch: Switch,
    disk: Elastic,
    vm: Guest,
}

impl Origin {
    fn new() -> Origin {
        let (switch, disk) = (Switch::new(), Elastic::new());
        let vm = Setup::new(format!("job=obey pages={PAGES}"))
            .disk(DiskSource::ReadOnly(Arc::new(disk.clone())))
            .sources(switch.clone())
            .faults(FaultConfig {
                chunk: 4096,
                readahead: 0,
                working_set: WorkingSetPolicy::Off,
                background: None,
                ..FaultConfig::default()
            })
            // A disk of the embedder's is of no use to a worker.
            .here()
            .boot();
        vm.wait_ready(LONG).unwrap();
        Obedient::new(&vm, vm.member()).write(0, VALUE, PAGES);
        let lazy = fork_by(FreezeKind::WriteProtect, MemoryMode::Lazy, 1);
        let point = vm.fork_point(lazy).unwrap();
        Origin {
            point,
            switch,
            disk,
            vm,
        }
    }

    /// A clone that has written a page, and has the code that it obeys with from then on.
    fn clone_at_work(&self) -> Obedient<'_> {
        let member = self.point.spawn(1).unwrap().remove(0);
        let mut clone = Obedient::new(&self.vm, &member);
        clone.write(0, 7, 1);
        clone.expect(0, 7, 1);
        clone
    }

    /// `sibling` and the parent go on, and so do further clones, which can be rewound.
    fn expect_unharmed(&self, way: RewindWay, mut sibling: Obedient<'_>) {
        sibling.expect(0, 7, 1);
        sibling.expect(1, VALUE + 1, PAGES - 1);
        let mut parent = Obedient::new(&self.vm, self.vm.member());
        parent.expect(0, VALUE, PAGES);
        parent.write(0, 9, PAGES);
        let mut further = self.clone_at_work();
        further.member.rewind(way).unwrap();
        further.expect(0, VALUE, PAGES);
        for vm in [sibling, further, parent] {
            vm.exit();
        }
    }
}

/// `clone` was rewound and is no more; what broke.
fn expect_broken(clone: &Member, rewound: Result<RewindWay, MemberError>) -> Break {
    let Err(MemberError::Rewind(RewindError::Broken(broken))) = rewound else {
        panic!("{rewound:?}");
    };
    let end = clone.wait_for(LONG).expect("it ends").end;
    let End::Failed(why) = end else {
        panic!("{} {end}", clone.name());
    };
    let due = format!("its rewind failed: {broken}");
    assert!(why.starts_with(&due), "{why:?}, and not {due:?}");
    broken
}

#[test]
fn a_clone_whose_state_does_not_fit_its_disk_any_more_ends_and_nobody_else() {
    need_kvm!();
    for way in ways_in_the_same_vm() {
        let origin = Origin::new();
        let (clone, sibling) = (origin.clone_at_work(), origin.clone_at_work());
        origin.disk.resize(2 * DISK);
        let broken = expect_broken(&clone.member, clone.member.rewind(way));
        assert!(matches!(broken, Break::State(_)), "{broken:?}");
        // A new clone does not fit that disk either, and is refused as a whole.
        assert!(origin.point.spawn(1).is_err());
        origin.disk.resize(DISK);
        origin.expect_unharmed(way, sibling);
    }
}

/// The clone waits for a page when it is rewound, and the page is lost while its state is put back: the
/// loss belongs to its old life, but its VM is condemned.
#[test]
fn a_clone_that_loses_a_page_in_the_middle_of_its_rewind_ends_and_nobody_else() {
    need_kvm!();
    for way in ways_in_the_same_vm() {
        let origin = Origin::new();
        let [mut clone, mut next, sibling] = [(); 3].map(|()| origin.clone_at_work());
        origin.switch.set_all(Manner::Stall);
        clone.begin("r 5 1");
        origin.switch.wait_stalled();
        next.begin("r 5 1");
        // Both hear of the loss in the order in which they asked.
        let (switch, next) = (origin.switch.clone(), next.member);
        origin.disk.when_asked(move || {
            switch.set_all(Manner::Fail);
            assert!(next.wait_for(LONG).is_some(), "it runs on without its page");
        });
        let broken = expect_broken(&clone.member, clone.member.rewind(way));
        assert!(matches!(broken, Break::Condemned), "{broken:?}");
        origin.switch.set_all(Manner::Near);
        origin.expect_unharmed(way, sibling);
    }
}
