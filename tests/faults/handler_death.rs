//! Threads that answer faults and die of it: nobody waits for ever, and nobody else notices.

use std::time::Duration;

use crate::common::need_kvm;
use crate::common::switch::Manner;
use crate::family::{FIRST, LIVE, Origin, expect_lost, pages};

const LATE: Duration = Duration::from_secs(10);

#[test]
fn a_fault_handler_that_dies_in_the_middle_of_a_fault_is_replaced_and_the_clone_goes_on() {
    need_kvm!();
    for freeze in LIVE {
        let origin = Origin::new(freeze, LATE);
        let ticket = origin.fork(origin.vm.member(), freeze, 2);
        let [mut a, mut b] = [0, 1].map(|number| origin.clone_of(&ticket, number));
        for page in [5, 9] {
            origin.switch.set(origin.page(page), Manner::Panic(1));
            a.expect(page, FIRST + page, 1);
            assert_eq!(origin.switch.panics_left(), 0, "the handler has died");
        }
        for clone in [&mut a, &mut b] {
            clone.expect(1, FIRST + 1, pages() - 1);
        }
        origin.expect_unharmed(freeze, FIRST);
    }
}

#[test]
fn a_handler_that_dies_of_a_clones_fault_again_and_again_ends_that_clone_with_the_reason() {
    need_kvm!();
    for freeze in LIVE {
        let origin = Origin::new(freeze, LATE);
        let ticket = origin.fork(origin.vm.member(), freeze, 3);
        let [mut a, mut b, mut c] = [0, 1, 2].map(|number| origin.clone_of(&ticket, number));
        origin.switch.set(origin.page(5), Manner::Panic(u32::MAX));
        let begun = a.begin("r 5 1");
        b.expect(6, FIRST + 6, pages() - 6);
        expect_lost(&a.member, begun + LATE, "the fault handler died");
        b.expect(1, FIRST + 1, 4);
        c.expect(6, FIRST + 6, pages() - 6);
        origin.parent().write(8, 8, 8);
        origin.parent().write(8, FIRST + 8, 8);
        origin.switch.set_all(Manner::Near);
        c.expect(1, FIRST + 1, pages() - 1);
        b.expect(1, FIRST + 1, pages() - 1);
        origin.expect_unharmed(freeze, FIRST);
    }
}
