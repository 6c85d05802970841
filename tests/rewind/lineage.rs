//! A clone that is a parent itself goes back; what came of it stays what it was.

use forkvm::engine::Member;
use forkvm::{CloneSpec, FreezeKind, MemoryMode};

use crate::common::{LONG, Obedient, Setup, fork_by, need_kvm};
use crate::ways;

const PAGES: u64 = 64;
const VALUE: u64 = 1_000_000;
const CHANGED: u64 = 2_000_000;

fn names(members: &[std::sync::Arc<Member>]) -> Vec<&str> {
    members.iter().map(|member| member.name()).collect()
}

/// The image of the clone's clones takes its pages from the clone, which drops them.
#[test]
fn clones_of_a_clone_live_on_when_it_goes_back() {
    need_kvm!();
    for way in ways() {
        let vm = Setup::new(format!("job=obey pages={PAGES}"))
            .no_copier()
            .boot();
        vm.wait_ready(LONG).unwrap();
        let mut parent = Obedient::new(&vm, vm.member());
        parent.write(0, VALUE, PAGES);
        let clones = vm.fork(CloneSpec::new(1)).unwrap();
        let mut clone = Obedient::new(&vm, clones[0].member());
        clone.write(0, CHANGED, PAGES / 2);
        let spec = fork_by(FreezeKind::Delta, MemoryMode::Lazy, 2);
        let children = clones[0].fork(spec.clone()).unwrap();
        clone.member.rewind(way).unwrap();

        clone.expect(0, VALUE, PAGES);
        for child in &children {
            let mut child = Obedient::new(&vm, child.member());
            child.expect(0, CHANGED, PAGES / 2);
            child.expect(PAGES / 2, VALUE + PAGES / 2, PAGES / 2);
        }
        // It can be forked again, and no name comes twice.
        clone.write(0, CHANGED + 1, 1);
        let late = clones[0].fork(spec).unwrap();
        let members: Vec<_> = children
            .iter()
            .chain(&late)
            .map(|vm| vm.member().clone())
            .collect();
        assert_eq!(names(&members), ["vm.1.1", "vm.1.2", "vm.1.3", "vm.1.4"]);
        let mut late = Obedient::new(&vm, late[0].member());
        late.expect(0, CHANGED + 1, 1);
        late.expect(1, VALUE + 1, PAGES - 1);
        // A second time, with two generations of images that it fed.
        clone.member.rewind(way).unwrap();
        clone.expect(0, VALUE, PAGES);
        late.expect(0, CHANGED + 1, 1);
        parent.expect(0, VALUE, PAGES);
    }
}
