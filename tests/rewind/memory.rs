//! A clone of an image that misses pages goes back, and still gets them by touch.

use forkvm::{FreezeKind, MemoryMode};

use crate::common::{LONG, Obedient, Setup, fork_by, need_kvm};
use crate::ways;

const PAGES: u64 = 96;
const VALUE: u64 = 1_000_000;

#[test]
fn pages_that_were_written_given_back_and_never_touched_are_those_of_the_fork_point() {
    need_kvm!();
    for way in ways() {
        let vm = Setup::new(format!("job=obey pages={PAGES}"))
            .no_copier()
            .boot();
        vm.wait_ready(LONG).unwrap();
        let mut parent = Obedient::new(&vm, vm.member());
        parent.write(0, VALUE, PAGES);
        let fork = fork_by(FreezeKind::WriteProtect, MemoryMode::Lazy, 1);
        let clones = vm.fork(fork).unwrap();
        let mut clone = Obedient::new(&vm, clones[0].member());
        for life in 1..=3 {
            clone.write(0, life, 16);
            clone.say("d 8 24");
            clone.expect(32, VALUE + 32, 8);
            clone.member.rewind(way).unwrap();
            parent.write(48, 0, 8);
            clone.expect(0, VALUE, 48);
        }
        let by_touch = vm.family().faults().figures().pages_by_fault;
        assert!(by_touch > 0, "pages came by touch");
        clone.expect(0, VALUE, PAGES);
        parent.expect(0, VALUE, 48);
    }
}
