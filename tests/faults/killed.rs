//! Clones that are killed while their source is silent: they end at once, and leave nothing.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use forkvm::End;
use forkvm::vmm::memory::data_extents;

use crate::common::switch::Manner;
use crate::common::{LONG, need_kvm};
use crate::family::{FIRST, LIVE, Origin, SOON, members, pages};

/// Longer than any test waits: nothing here ends by a deadline.
const NEVER: Duration = Duration::from_secs(300);

#[test]
fn a_clone_that_is_killed_while_its_source_is_silent_ends_at_once_and_leaves_no_page_in_the_image()
{
    need_kvm!();
    for freeze in LIVE {
        let origin = Origin::new(freeze, NEVER);
        let ticket = origin.fork(origin.vm.member(), freeze, 3);
        let [mut a, mut b, mut c] = [0, 1, 2].map(|number| origin.clone_of(&ticket, number));
        origin.switch.set(origin.page(5), Manner::Stall);
        a.begin("r 5 1");
        c.begin("r 5 1");
        origin.switch.wait_stalled();

        let killed = Instant::now();
        let waiting = {
            let member = a.member.clone();
            thread::spawn(move || member.wait())
        };
        a.member.kill();
        let finished = waiting.join().unwrap();
        assert!(killed.elapsed() < SOON, "{:?}", killed.elapsed());
        assert_eq!(finished.end, End::Killed);

        let file = ticket.point.image().file();
        let missing = origin.page(5);
        let is_there = |offset: u64| {
            let data = data_extents(file).unwrap();
            data.iter().any(|run| run.contains(&offset))
        };
        assert!(!is_there(missing.start), "its end stored a zero page");
        b.expect(1, FIRST + 1, 4);
        b.expect(6, FIRST + 6, pages() - 6);
        assert!(!is_there(missing.start));

        origin.switch.set_all(Manner::Near);
        assert_eq!(c.answer("r 5 1"), [format!("= 5 {}", FIRST + 5)]);
        b.expect(1, FIRST + 1, pages() - 1);
        c.expect(1, FIRST + 1, pages() - 1);
        origin.expect_unharmed(freeze, FIRST);
    }
}

#[test]
fn a_family_whose_clones_all_wait_for_a_silent_source_can_be_ended() {
    need_kvm!();
    for freeze in LIVE {
        let origin = Origin::new(freeze, Duration::from_millis(300));
        let ticket = origin.fork(origin.vm.member(), freeze, 3);
        let clones: Vec<_> = (0..3)
            .map(|number| origin.clone_of(&ticket, number))
            .collect();
        origin.switch.set_all(Manner::Stall);
        for mut clone in clones {
            clone.begin("r 5 1");
        }
        origin.switch.wait_stalled();
        let members: Vec<_> = members(&ticket).iter().map(Arc::clone).collect();
        drop(ticket);
        let ended = Instant::now();
        origin.vm.family().end();
        assert!(ended.elapsed() < 4 * SOON, "{:?}", ended.elapsed());
        assert!(members.iter().all(|member| member.wait_for(LONG).is_some()));
        origin.switch.set_all(Manner::Near);
    }
}
