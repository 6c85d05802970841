//! Working sets: what clones touch is recorded in order, and given to those of the next fork by the
//! same rules as pages that are asked for.

use std::ops::Range;
use std::thread;
use std::time::{Duration, Instant};

use forkvm::{FreezeKind, MemoryMode};

use crate::common::switch::Manner;
use crate::common::{LONG, Obedient, fork_by, need_kvm};
use crate::family::{FIRST, LIVE, Origin, SOON, expect_lost, pages};

const DEADLINE: Duration = Duration::from_secs(2);

/// Pages that are touched, so far behind the first one that no write of the parent to what lies before
/// it brings them along.
const TOUCHED: Range<u64> = 16..24;

/// One of them that its source has difficulties with.
const BAD: u64 = 19;

/// A clone of a fork of its own touches them, and ends.
fn touch(origin: &Origin, freeze: FreezeKind) {
    let ticket = origin.fork(origin.vm.member(), freeze, 1);
    let mut clone = origin.clone_of(&ticket, 0);
    expect(&mut clone, TOUCHED);
    clone.exit();
    let set = ticket.point.working_set();
    for page in TOUCHED {
        assert!(set.ranges().contains(&origin.page(page)), "page {page}");
    }
}

/// `pages` hold what they held at first.
fn expect(vm: &mut Obedient<'_>, pages: Range<u64>) {
    vm.expect(pages.start, FIRST + pages.start, pages.end - pages.start);
}

#[test]
fn first_touches_are_recorded_in_their_order() {
    need_kvm!();
    for freeze in LIVE {
        let origin = Origin::replaying(freeze, DEADLINE);
        let ticket = origin.fork(origin.vm.member(), freeze, 1);
        let mut clone = origin.clone_of(&ticket, 0);
        let order = [23, 17, 20, 16, 22, 18];
        for page in order {
            expect(&mut clone, page..page + 1);
        }
        // A second touch is none.
        expect(&mut clone, 20..21);
        let area = origin.page(TOUCHED.start).start..origin.page(TOUCHED.end).start;
        let set = ticket.point.working_set();
        let recorded = set.ranges().iter();
        let recorded: Vec<_> = recorded.filter(|run| area.contains(&run.start)).collect();
        let touched = order.map(|page| origin.page(page));
        assert_eq!(recorded, touched.iter().collect::<Vec<_>>());
    }
}

#[test]
fn clones_of_the_next_fork_find_there_what_those_of_the_last_one_touched() {
    need_kvm!();
    for freeze in LIVE {
        // Faults that brought pages to the clone of each of two forks, which read all of them.
        let faults = |origin: &Origin, replays: bool| {
            [false, replays].map(|is_replayed| {
                let spec = fork_by(freeze, MemoryMode::Lazy, 1);
                let point = origin.vm.fork_point(spec).unwrap();
                let start = Instant::now();
                while is_replayed && point.image().pages_present() < pages() {
                    assert!(start.elapsed() < LONG, "nothing is replayed");
                    thread::sleep(Duration::from_millis(1));
                }
                let faults = || origin.vm.family().faults().figures().fetch_ns.len();
                let before = faults();
                let clone = point.spawn(1).unwrap().remove(0);
                let mut clone = Obedient::new(&origin.vm, &clone);
                clone.expect(0, FIRST, pages());
                let raised = faults() - before;
                clone.exit();
                // What is protected is as it was for the next fork.
                origin.parent().write(0, FIRST, pages());
                raised
            })
        };
        let [first, second] = faults(&Origin::replaying(freeze, DEADLINE), true);
        println!("{freeze}: {first} faults, {second} with a replay");
        // A parent that writes brings a page or two as well.
        assert!(first >= pages() / 2, "{first}");
        assert!(second * 4 < first, "{second} faults of {first} are left");
        let [first, second] = faults(&Origin::new(freeze, DEADLINE), false);
        assert!(second >= first / 2, "{first}, {second}");
    }
}

#[test]
fn a_replay_gives_the_memory_of_its_own_fork() {
    need_kvm!();
    for freeze in LIVE {
        let origin = Origin::replaying(freeze, DEADLINE);
        touch(&origin, freeze);
        // Each fork sees what its parent has written since, and not what it writes afterwards.
        for round in 1..=4 {
            origin.parent().write(0, round * 1000, pages());
            let ticket = origin.fork(origin.vm.member(), freeze, 2);
            origin.parent().write(0, round, pages());
            for number in 0..2 {
                let clone = &ticket.clones[number];
                let mut clone = Obedient::new(&origin.vm, clone);
                clone.expect(0, round * 1000, pages());
                clone.exit();
            }
        }
    }
}

#[test]
fn a_source_that_stalls_under_a_replay_holds_up_no_fork_and_ends_who_needs_it_by_its_deadline() {
    need_kvm!();
    for freeze in LIVE {
        let origin = Origin::replaying(freeze, DEADLINE);
        touch(&origin, freeze);
        origin.switch.set(origin.page(BAD), Manner::Stall);
        let asked = Instant::now();
        let ticket = origin.fork(origin.vm.member(), freeze, 2);
        // By the replay: no clone was told to touch it yet.
        origin.switch.wait_stalled();
        let [mut a, mut b] = [0, 1].map(|number| origin.clone_of(&ticket, number));
        expect(&mut b, BAD + 1..TOUCHED.end);
        assert!(asked.elapsed() < DEADLINE, "the fork did not wait for it");
        let begun = a.begin(&format!("r {BAD} 1"));
        expect_lost(&a.member, begun + DEADLINE + SOON, "no answer");
        expect(&mut b, BAD + 1..TOUCHED.end);
        origin.parent().expect(0, FIRST, pages());
        origin.expect_unharmed(freeze, FIRST);
    }
}

#[test]
fn a_source_that_fails_or_lies_under_a_replay_ends_only_those_who_touch_the_page() {
    need_kvm!();
    for (manner, why) in [
        (Manner::Fail, "as the test says"),
        (Manner::Nothing, "not delivered"),
        (Manner::Short, "no pages of this memory"),
    ] {
        let freeze = FreezeKind::WriteProtect;
        let origin = Origin::replaying(freeze, DEADLINE);
        touch(&origin, freeze);
        origin.switch.set(origin.page(BAD), manner);
        let ticket = origin.fork(origin.vm.member(), freeze, 2);
        let [mut a, mut b] = [0, 1].map(|number| origin.clone_of(&ticket, number));
        expect(&mut b, BAD + 1..TOUCHED.end);
        let begun = a.begin(&format!("r {} 4", BAD - 2));
        expect_lost(&a.member, begun + SOON, why);
        expect(&mut b, BAD + 1..pages());
        origin.switch.set_all(Manner::Near);
        expect(&mut b, 1..pages());
        origin.expect_unharmed(freeze, FIRST);
    }
}
