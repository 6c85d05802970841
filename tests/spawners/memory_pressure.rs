//! Clones want more memory than their process may have: the kernel kills that process, and nobody else suffers.

use forkvm::engine::spawn::Spawner;
use forkvm::{CloneSpec, CloneVm, FreezeKind, MemoryMode};

use crate::common::{LONG, Obedient, Setup, TestGroup, fork_by, need_kvm, workers};
use crate::crashes::{expect_killed_with_its_worker, process_of};

/// Of the guest.
const PAGES: u64 = 24 << 8;

/// What the worker may have beside what it had when the limit came, in bytes.
const LIMIT: u64 = 12 << 20;

#[test]
fn a_worker_that_is_killed_for_want_of_memory_ends_its_clones_alone_and_by_name() {
    need_kvm!();
    for mode in [MemoryMode::Cow, MemoryMode::Lazy] {
        let Some(group) = TestGroup::new("memory") else {
            return;
        };
        group.set(group.memory_limit(), &LIMIT.to_string());
        let process = workers();
        let vm = Setup::new(format!("job=obey pages={PAGES}"))
            .spawner(process.clone())
            .boot();
        vm.wait_ready(LONG).unwrap();
        let mut parent = Obedient::new(&vm, vm.member());
        parent.write(0, 1000, 64);
        let clones = vm.fork(fork_by(FreezeKind::Auto, mode, 4)).unwrap();
        let poor = process_of(&clones[0]);
        group.take_in(poor);

        let (gone, left): (Vec<_>, Vec<_>) = clones.iter().partition(|vm| process_of(vm) == poor);
        assert_eq!((gone.len(), left.len()), (2, 2));
        Obedient::new(&vm, gone[0].member()).begin(&format!("w 0 1 {PAGES}"));
        for clone in gone {
            expect_killed_with_its_worker(clone);
            let end = clone.member().wait().end.to_string();
            assert!(end.contains("want of memory"), "{end}");
        }
        for clone in left {
            let mut clone = Obedient::new(&vm, clone.member());
            clone.expect(0, 1000, 64);
            clone.write(0, 1, PAGES);
            clone.exit();
        }
        parent.expect(0, 1000, 64);

        // Its successor is not in that cgroup.
        let clones: Vec<CloneVm> = vm.fork(CloneSpec::new(2)).unwrap();
        assert!(!process.processes().contains(&poor));
        for clone in &clones {
            let mut clone = Obedient::new(&vm, clone.member());
            clone.expect(0, 1000, 64);
            clone.write(0, 1, PAGES);
            clone.exit();
        }
        parent.exit();
    }
}
