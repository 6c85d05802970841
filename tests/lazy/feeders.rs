//! An image that misses pages outlives the VM that has them: however that VM ends, what its clones
//! have not fetched yet is brought into the image first.

use std::sync::Arc;

use forkvm::{End, ForkPoint, FreezeKind, MemoryMode};

use crate::common::{Guest, LONG, Obedient, Setup, expect_end, fork_by, need_kvm, scaled};

/// How a parent ends right after its fork.
#[derive(Clone, Copy, Debug)]
enum Exit {
    Exits,
    IsKilled,
    TripleFaults,
}

impl Exit {
    fn of(self, vm: &Guest, mut parent: Obedient<'_>) {
        match self {
            Exit::Exits => parent.exit(),
            Exit::IsKilled => {
                parent.member.kill();
                expect_end(vm, &parent.member, End::Killed);
            }
            Exit::TripleFaults => {
                parent.begin("t");
                expect_end(vm, &parent.member, End::TripleFault { vcpu: 0 });
            }
        }
    }
}

/// Numbers that the origin and its clone write.
const ORIGINS: u64 = 1_000_000;
const CLONES: u64 = 2_000_000;

/// The pages of a family. The origin writes all of them; its clone, after that, the upper half.
struct Pages {
    all: u64,
    half: u64,
}

impl Pages {
    fn new() -> Pages {
        let all = u64::from(scaled(256, 64));
        Pages { all, half: all / 2 }
    }

    fn boot(&self) -> Guest {
        let vm = Setup::new(format!("job=obey pages={}", self.all))
            .no_copier()
            .boot();
        vm.wait_ready(LONG).unwrap();
        Obedient::new(&vm, vm.member()).write(0, ORIGINS, self.all);
        vm
    }

    fn expect_origins(&self, vm: &Guest, point: &Arc<ForkPoint>) {
        for clone in point.spawn(2).unwrap() {
            Obedient::new(vm, &clone).expect(0, ORIGINS, self.all);
        }
    }

    fn expect_clones(&self, vm: &Guest, point: &Arc<ForkPoint>) {
        for clone in point.spawn(2).unwrap() {
            let mut clone = Obedient::new(vm, &clone);
            clone.expect(0, ORIGINS, self.half);
            clone.expect(self.half, CLONES, self.half);
        }
    }
}

fn expect_cold(point: &ForkPoint) {
    assert!(!point.image().is_whole(), "the clones are cold");
}

fn parent_ends(exit: Exit) {
    need_kvm!();
    let pages = Pages::new();
    let vm = pages.boot();
    let point = vm
        .fork_point(fork_by(FreezeKind::WriteProtect, MemoryMode::Lazy, 1))
        .unwrap();
    expect_cold(&point);
    exit.of(&vm, Obedient::new(&vm, vm.member()));
    pages.expect_origins(&vm, &point);
}

/// The origin, a clone that has read nothing, and clones of that one: the middle ends, with the
/// origin before it, after it, or not at all.
fn middle_ends(exit: Exit) {
    need_kvm!();
    let pages = Pages::new();
    for origin in [None, Some(Order::Before), Some(Order::After)] {
        let vm = pages.boot();
        let first = vm
            .fork_point(fork_by(FreezeKind::WriteProtect, MemoryMode::Lazy, 1))
            .unwrap();
        let clone = first.spawn(1).unwrap().remove(0);
        let mut clone = Obedient::new(&vm, &clone);
        clone.write(pages.half, CLONES, pages.half);
        let second = clone
            .member
            .fork_point(fork_by(FreezeKind::Delta, MemoryMode::Lazy, 1))
            .unwrap();
        expect_cold(&first);
        expect_cold(&second);
        // The origin changes its mind: no image may see that.
        Obedient::new(&vm, vm.member()).write(0, 0, pages.all);
        if origin == Some(Order::Before) {
            exit.of(&vm, Obedient::new(&vm, vm.member()));
        }
        exit.of(&vm, clone);
        if origin == Some(Order::After) {
            exit.of(&vm, Obedient::new(&vm, vm.member()));
        }
        println!("{exit:?}, the origin {origin:?}");
        pages.expect_clones(&vm, &second);
        pages.expect_origins(&vm, &first);
    }
}

/// When the origin ends, seen from the end of its clone.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Order {
    Before,
    After,
}

#[test]
fn cold_clones_outlive_a_parent_that_exits() {
    parent_ends(Exit::Exits);
}

#[test]
fn cold_clones_outlive_a_parent_that_is_killed() {
    parent_ends(Exit::IsKilled);
}

#[test]
fn cold_clones_outlive_a_parent_that_triple_faults() {
    parent_ends(Exit::TripleFaults);
}

#[test]
fn cold_clones_outlive_the_middle_of_their_chain_that_exits() {
    middle_ends(Exit::Exits);
}

#[test]
fn cold_clones_outlive_the_middle_of_their_chain_that_is_killed() {
    middle_ends(Exit::IsKilled);
}

#[test]
fn cold_clones_outlive_the_middle_of_their_chain_that_triple_faults() {
    middle_ends(Exit::TripleFaults);
}

/// A stopped parent is gone as soon as its fork point is there.
#[test]
fn cold_clones_outlive_a_clone_that_was_stopped_for_them() {
    need_kvm!();
    let pages = Pages::new();
    let vm = pages.boot();
    let first = vm
        .fork_point(fork_by(FreezeKind::WriteProtect, MemoryMode::Lazy, 1))
        .unwrap();
    let clone = first.spawn(1).unwrap().remove(0);
    Obedient::new(&vm, &clone).write(pages.half, CLONES, pages.half);
    let second = clone
        .fork_point(fork_by(FreezeKind::Stop, MemoryMode::Lazy, 1))
        .unwrap();
    expect_end(&vm, &clone, End::Stopped);
    vm.kill();
    expect_end(&vm, vm.member(), End::Killed);
    pages.expect_clones(&vm, &second);
    pages.expect_origins(&vm, &first);
}
