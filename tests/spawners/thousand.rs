//! A thousand clones alive at once, each of which does as it is told and sees its own memory.

use std::sync::Arc;
use std::time::Instant;

use forkvm::CloneSpec;
use forkvm::engine::spawn::Spawner;
use forkvm::engine::spawn::in_process::InProcess;

use crate::common::{LONG, Obedient, Setup, need_kvm, scaled, workers_of};

const PAGES: u64 = 16;
const VALUE: u64 = 1_000_000;

/// Forks a guest into `count` clones, and talks to each of them while all live.
fn all_answer(spawner: Arc<dyn Spawner>, count: u32) {
    let vm = Setup::new(format!("job=obey pages={PAGES}"))
        .memory_mib(32)
        .spawner(spawner)
        .boot();
    vm.wait_ready(LONG).unwrap();
    let mut parent = Obedient::new(&vm, vm.member());
    parent.write(0, VALUE, PAGES);

    let begun = Instant::now();
    // A host without room for them says in the error what it lacks.
    let spec = CloneSpec {
        expected_write_mib: 0,
        ..CloneSpec::new(count)
    };
    let clones = vm.fork(spec).unwrap();
    let forked = begun.elapsed();
    let mut clones: Vec<_> = clones
        .iter()
        .map(|clone| Obedient::new(&vm, clone.member()))
        .collect();
    // One page each: a line takes a guest many exits.
    let own = |number: u64| number % PAGES;
    for (number, clone) in (1..).zip(&mut clones) {
        clone.expect(own(number), VALUE + own(number), 1);
        clone.write(own(number), number, 1);
    }
    // After all have written.
    for (number, clone) in (1..).zip(&mut clones) {
        clone.expect(own(number), number, 1);
    }
    parent.expect(0, VALUE, PAGES);
    assert_eq!(vm.family().running().len() as u32, 1 + count);

    let answered = begun.elapsed();
    for clone in clones {
        clone.exit();
    }
    println!(
        "{count} clones: forked in {forked:?}, all have answered after {answered:?}, \
         ended after {:?}",
        begun.elapsed()
    );
}

#[test]
fn a_thousand_clones_in_workers_are_alive_at_once_and_each_answers() {
    need_kvm!();
    let count = scaled(1000, 24);
    all_answer(workers_of(2, count.div_ceil(8)), count);
}

#[test]
fn a_thousand_clones_in_one_process_are_alive_at_once_and_each_answers() {
    need_kvm!();
    all_answer(Arc::new(InProcess), scaled(1000, 24));
}
