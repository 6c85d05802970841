//! A clone that its owner holds goes back, and is held there.

use forkvm::CloneSpec;

use crate::common::{LONG, Obedient, Setup, need_kvm};
use crate::ways;

#[test]
fn a_held_clone_that_is_rewound_is_held_at_its_fork_point() {
    need_kvm!();
    for way in ways() {
        let vm = Setup::new("job=obey pages=16").boot();
        vm.wait_ready(LONG).unwrap();
        let clones = vm.fork(CloneSpec::new(2)).unwrap();
        let (held, other) = (&clones[0], &clones[1]);
        Obedient::new(&vm, held.member()).write(1, 5, 1);
        held.member().pause().unwrap();
        held.rewind_by(way).unwrap();
        assert!(held.member().is_paused());
        // A clone that is not held has run by now, and answered.
        other.rewind_by(way).unwrap();
        Obedient::new(&vm, other.member()).expect(1, 0, 1);
        assert!(held.timeline().first_run.is_none(), "{way}");
        held.member().resume().unwrap();
        Obedient::new(&vm, held.member()).expect(1, 0, 1);
        assert!(held.timeline().first_run.is_some());
    }
}
