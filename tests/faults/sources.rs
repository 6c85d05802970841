//! Sources that stall, fail, lie or go: who ends with that reason, and who runs on.

use std::thread;
use std::time::{Duration, Instant};

use forkvm::{End, FreezeKind, MemoryMode};

use crate::common::switch::Manner;
use crate::common::{LONG, Obedient, expect_end, fork_by, need_kvm};
use crate::family::{FIRST, LIVE, Origin, SOON, expect_lost, pages};

const DEADLINE: Duration = Duration::from_millis(400);

#[test]
fn a_source_that_stalls_ends_the_clones_that_need_it_by_its_deadline_and_nobody_else() {
    need_kvm!();
    for freeze in LIVE {
        let origin = Origin::new(freeze, DEADLINE);
        let ticket = origin.fork(origin.vm.member(), freeze, 3);
        let [mut a, mut b, mut c] = [0, 1, 2].map(|number| origin.clone_of(&ticket, number));
        b.expect(6, FIRST + 6, 8);

        origin.switch.set(origin.page(5), Manner::Stall);
        let asked = Instant::now();
        let begun = a.begin("r 5 1");
        origin.switch.wait_stalled();
        // While it stalls.
        b.expect(6, FIRST + 6, 8);
        c.expect(6, FIRST + 6, 8);
        origin.parent().expect(0, FIRST, pages());
        expect_lost(&a.member, begun + DEADLINE + SOON, "no answer");
        assert!(asked.elapsed() >= DEADLINE, "it is not given up before");

        // Afterwards: what is here is here, and the rest is not waited for again.
        b.expect(6, FIRST + 6, 8);
        c.expect(6, FIRST + 6, 8);
        let begun = b.begin("r 20 1");
        expect_lost(&b.member, begun + SOON, "no answer");
        let copy = fork_by(FreezeKind::Copy, MemoryMode::Cow, 1);
        let refused = c.member.fork(copy);
        assert!(refused.is_err());
        c.expect(6, FIRST + 6, 8);
        origin.expect_unharmed(freeze, FIRST);
    }
}

#[test]
fn a_clone_of_a_source_that_stalls_goes_on_when_its_parent_writes_the_page() {
    need_kvm!();
    for freeze in LIVE {
        let origin = Origin::new(freeze, DEADLINE);
        let ticket = origin.fork(origin.vm.member(), freeze, 1);
        let mut clone = origin.clone_of(&ticket, 0);
        origin.switch.set(origin.page(5), Manner::Stall);
        clone.begin("r 5 1");
        origin.switch.wait_stalled();
        // The page is brought to the image before the write goes through.
        origin.parent().write(5, 77, 1);
        assert_eq!(clone.answer("r 5 1"), [format!("= 5 {}", FIRST + 5)]);
        origin.parent().write(5, FIRST + 5, 1);
        origin.expect_unharmed(freeze, FIRST);
    }
}

#[test]
fn clones_that_already_have_what_they_need_do_not_notice_that_their_source_is_gone() {
    need_kvm!();
    for freeze in LIVE {
        let origin = Origin::new(freeze, DEADLINE);
        let ticket = origin.fork(origin.vm.member(), freeze, 3);
        let [mut a, mut b, mut c] = [0, 1, 2].map(|number| origin.clone_of(&ticket, number));
        b.expect(6, FIRST + 6, 8);
        origin.switch.set_all(Manner::Gone);
        for clone in [&mut a, &mut c] {
            let begun = clone.begin("r 5 1");
            expect_lost(&clone.member, begun + SOON, "as the test says");
        }
        b.expect(6, FIRST + 6, 8);
        b.write(6, 1, 8);
        b.expect(6, 1, 8);
        origin.expect_unharmed(freeze, FIRST);
        b.expect(6, 1, 8);
    }
}

/// A source that cannot deliver page 5 in some way.
fn costs_only_those_who_need_that_page(manner: Manner, why: &str) {
    for freeze in LIVE {
        let origin = Origin::new(freeze, DEADLINE);
        let ticket = origin.fork(origin.vm.member(), freeze, 3);
        let [mut a, mut b, mut c] = [0, 1, 2].map(|number| origin.clone_of(&ticket, number));
        origin.switch.set(origin.page(5), manner);
        let begun = a.begin("r 3 4");
        expect_lost(&a.member, begun + SOON, why);
        for clone in [&mut b, &mut c] {
            clone.expect(1, FIRST + 1, 4);
            clone.expect(6, FIRST + 6, pages() - 6);
        }
        // A page that is overwritten as a whole would not be needed; this one is read first.
        let begun = c.begin("w 5 1 1");
        expect_lost(&c.member, begun + SOON, why);
        b.expect(6, FIRST + 6, pages() - 6);
        origin.switch.set_all(Manner::Near);
        b.expect(1, FIRST + 1, pages() - 1);
        origin.expect_unharmed(freeze, FIRST);
    }
}

#[test]
fn a_source_that_fails_one_page_ends_only_those_who_touch_it() {
    need_kvm!();
    costs_only_those_who_need_that_page(Manner::Fail, "as the test says");
}

#[test]
fn a_source_that_leaves_a_page_out_ends_only_those_who_touch_it() {
    need_kvm!();
    costs_only_those_who_need_that_page(Manner::Nothing, "not delivered");
}

#[test]
fn a_source_that_delivers_part_of_a_page_ends_only_those_who_touch_it() {
    need_kvm!();
    costs_only_those_who_need_that_page(Manner::Short, "no pages of this memory");
}

/// A source that cannot deliver page 5 in some way, of a parent whose images are completed: the oldest
/// for its third fork, the others at its end.
fn costs_only_that_page_when_images_are_completed(manner: Manner, why: &str) {
    for freeze in LIVE {
        let origin = Origin::new(freeze, DEADLINE);
        let fork = || origin.fork(origin.vm.member(), freeze, 3);
        let ticket = fork();
        let [mut a, mut b, mut c] = [0, 1, 2].map(|number| origin.clone_of(&ticket, number));
        origin.switch.set(origin.page(5), manner);
        let later = [fork(), fork()];
        let begun = a.begin("r 3 4");
        expect_lost(&a.member, begun + SOON, why);
        b.expect(6, FIRST + 6, pages() - 6);
        origin.parent().expect(0, FIRST, pages());

        origin.vm.kill();
        expect_end(&origin.vm, origin.vm.member(), End::Killed);
        b.expect(1, FIRST + 1, 4);
        c.expect(6, FIRST + 6, pages() - 6);
        c.write(6, 1, 4);
        for ticket in &later {
            let [mut d, mut e] = [0, 1].map(|number| origin.clone_of(ticket, number));
            let begun = d.begin("r 5 1");
            expect_lost(&d.member, begun + SOON, why);
            e.expect(1, FIRST + 1, 4);
            e.expect(6, FIRST + 6, pages() - 6);
        }
        // Whoever had it is gone.
        origin.switch.set_all(Manner::Near);
        let begun = c.begin("w 5 1 1");
        expect_lost(&c.member, begun + SOON, why);
        b.expect(6, FIRST + 6, pages() - 6);
    }
}

#[test]
fn a_page_that_fails_as_its_images_are_completed_ends_only_those_who_touch_it() {
    need_kvm!();
    costs_only_that_page_when_images_are_completed(Manner::Fail, "as the test says");
}

#[test]
fn a_page_that_is_left_out_as_its_images_are_completed_ends_only_those_who_touch_it() {
    need_kvm!();
    costs_only_that_page_when_images_are_completed(Manner::Nothing, "not delivered");
}

#[test]
fn a_page_that_comes_in_part_as_its_images_are_completed_ends_only_those_who_touch_it() {
    need_kvm!();
    costs_only_that_page_when_images_are_completed(Manner::Short, "no pages of this memory");
}

#[test]
fn a_grandchild_ends_with_the_reason_of_its_grandparents_source() {
    need_kvm!();
    let freeze = FreezeKind::WriteProtect;
    let origin = Origin::new(freeze, DEADLINE);
    let ticket = origin.fork(origin.vm.member(), freeze, 2);
    let mut clone = origin.clone_of(&ticket, 0);
    clone.write(20, 1, 2);
    let below = origin.fork(&clone.member, FreezeKind::Delta, 2);
    let mut grandchildren = [0, 1].map(|number| origin.clone_of(&below, number));
    origin.switch.set(origin.page(5), Manner::Fail);
    let begun = grandchildren[0].begin("r 5 1");
    expect_lost(
        &grandchildren[0].member,
        begun + SOON,
        "VM vm cannot deliver",
    );
    grandchildren[1].expect(20, 1, 2);
    grandchildren[1].expect(6, FIRST + 6, 10);
    clone.expect(6, FIRST + 6, 10);
    origin.switch.set_all(Manner::Near);
    grandchildren[1].expect(5, FIRST + 5, 1);
    origin.expect_unharmed(freeze, FIRST);
}

#[test]
fn a_source_that_is_slow_within_its_deadline_is_waited_for() {
    need_kvm!();
    for freeze in LIVE {
        let origin = Origin::new(freeze, 20 * DEADLINE);
        let ticket = origin.fork(origin.vm.member(), freeze, 2);
        let [mut a, mut b] = [0, 1].map(|number| origin.clone_of(&ticket, number));
        origin.switch.set(origin.page(5), Manner::Stall);
        a.begin("r 1 8");
        b.begin("r 4 2");
        origin.switch.wait_stalled();
        origin.parent().write(5, 1, 1);
        thread::sleep(DEADLINE / 4);
        origin.switch.set_all(Manner::Far);
        assert_eq!(a.answer("r 1 8").len(), 8);
        assert_eq!(b.answer("r 4 2").len(), 2);
        a.expect(1, FIRST + 1, pages() - 1);
        b.expect(1, FIRST + 1, pages() - 1);
        origin.parent().write(5, FIRST + 5, 1);
        origin.expect_unharmed(freeze, FIRST);
    }
}

#[test]
fn far_sources_serve_clones_of_clones_that_are_forked_while_they_fetch() {
    need_kvm!();
    let freeze = FreezeKind::WriteProtect;
    let origin = Origin::new(freeze, LONG);
    origin.switch.set_all(Manner::Far);
    let mut line = vec![origin.vm.member().clone()];
    for depth in 0..4 {
        let freeze = if depth == 0 {
            freeze
        } else {
            FreezeKind::Delta
        };
        let ticket = origin.fork(line.last().unwrap(), freeze, 2);
        let mut clone = origin.clone_of(&ticket, 0);
        clone.write(10 + depth, 100 + depth, 1);
        origin.clone_of(&ticket, 1).expect(5, FIRST + 5, 1);
        line.push(clone.member.clone());
    }
    for (depth, member) in (1..).zip(&line[1..]) {
        let mut clone = Obedient::new(&origin.vm, member);
        for written in 0..4 {
            let value = if written < depth {
                100 + written
            } else {
                FIRST + 10 + written
            };
            clone.expect(10 + written, value, 1);
        }
        clone.expect(1, FIRST + 1, 9);
        clone.expect(14, FIRST + 14, pages() - 14);
    }
}
