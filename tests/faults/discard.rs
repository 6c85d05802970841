//! Pages that guests give back: zero for who gave them back, and what they were for everybody else.

use forkvm::abi::doorbell::report;
use forkvm::engine::Member;
use forkvm::{End, FaultConfig, FreezeKind, MemoryMode};

use crate::common::{Guest, LONG, Obedient, Setup, expect_end, fork_by, need_kvm, scaled};
use crate::family::{FIRST, LIVE, Origin, pages};

use FreezeKind::{Copy, Delta, Remap, Stop, WriteProtect};
use MemoryMode::{Cow, Lazy};

/// Nothing is told to this long.
fn reported(vm: &Guest, member: &Member, value: u32, times: usize) {
    if let Err(error) = member.wait_report(value, times, LONG) {
        panic!("{error}\n{}", vm.consoles.text());
    }
}

/// A guest that gives pages back at its boot and, as a clone, once more; it knows what each page
/// must hold.
fn discarder(background: Option<u32>) -> Guest {
    let (mib, count) = (scaled(4, 1), scaled(64, 8));
    let vm = Setup::new(format!("job=discard mib={mib} count={count}"))
        .memory_mib(32)
        .faults(FaultConfig {
            background,
            ..FaultConfig::default()
        })
        .boot();
    vm.wait_ready(LONG).unwrap();
    vm
}

/// The copier's rates: off, and about as fast as it can be.
const COPIERS: [Option<u32>; 2] = [None, Some(4096)];

/// Forks a parent that gave pages back before, its clones, which have given back others since, and
/// those again.
fn every_generation_knows_its_pages(
    first: (FreezeKind, MemoryMode),
    later: (FreezeKind, MemoryMode),
) {
    for background in COPIERS {
        let vm = discarder(background);
        let mut last = vm.member().clone();
        for generation in 0..3 {
            let (freeze, mode) = if generation == 0 { first } else { later };
            let ticket = last.fork(fork_by(freeze, mode, 2)).unwrap();
            for clone in &ticket.clones {
                reported(&vm, clone, report::USER, 1);
                reported(&vm, clone, report::USER + 1, 1);
            }
            if freeze == Stop {
                expect_end(&vm, &last, End::Stopped);
            } else {
                // It was told of the fork and has looked at all its pages.
                reported(
                    &vm,
                    &last,
                    report::USER,
                    if generation == 0 { 1 } else { 2 },
                );
            }
            last = ticket.clones[1].clone();
        }
        assert_eq!(vm.consoles.text(), "");
    }
}

#[test]
fn discards_of_a_shared_parent_are_in_its_clones_by_remap_and_in_theirs_by_delta() {
    need_kvm!();
    every_generation_knows_its_pages((Remap, Cow), (Delta, Lazy));
    every_generation_knows_its_pages((Remap, Cow), (Delta, Cow));
}

#[test]
fn discards_of_a_shared_parent_are_in_its_clones_by_write_protect_and_in_theirs_by_delta() {
    need_kvm!();
    every_generation_knows_its_pages((WriteProtect, Lazy), (Delta, Lazy));
    every_generation_knows_its_pages((WriteProtect, Lazy), (Delta, Cow));
}

#[test]
fn discards_are_in_clones_by_copy() {
    need_kvm!();
    every_generation_knows_its_pages((Copy, Cow), (Copy, Cow));
    every_generation_knows_its_pages((WriteProtect, Lazy), (Copy, Cow));
}

#[test]
fn discards_are_in_clones_of_a_parent_that_was_stopped() {
    need_kvm!();
    every_generation_knows_its_pages((Stop, Cow), (Stop, Lazy));
    every_generation_knows_its_pages((Stop, Lazy), (Stop, Cow));
    every_generation_knows_its_pages((WriteProtect, Lazy), (Stop, Lazy));
}

#[test]
fn a_parent_that_gave_pages_back_is_forked_again_and_again() {
    need_kvm!();
    for (first, again) in [
        ((Remap, Cow), (Delta, Lazy)),
        ((WriteProtect, Lazy), (WriteProtect, Lazy)),
        ((Copy, Cow), (WriteProtect, Lazy)),
    ] {
        let vm = discarder(None);
        for fork in 1..=4 {
            let (freeze, mode) = if fork == 1 { first } else { again };
            let ticket = vm.member().fork(fork_by(freeze, mode, 1)).unwrap();
            reported(&vm, &ticket.clones[0], report::USER + 1, 1);
            reported(&vm, vm.member(), report::USER, fork);
        }
        assert_eq!(vm.consoles.text(), "");
    }
}

#[test]
fn a_clone_is_forked_in_the_middle_of_its_discards() {
    need_kvm!();
    let vm = discarder(None);
    let ticket = vm.member().fork(fork_by(WriteProtect, Lazy, 3)).unwrap();
    for clone in &ticket.clones {
        reported(&vm, clone, report::USER, 1);
        // It is at it now.
        let below = clone.fork(fork_by(Delta, Lazy, 1)).unwrap();
        reported(&vm, &below.clones[0], report::USER + 1, 1);
        reported(&vm, clone, report::USER + 1, 1);
        let below = clone.fork(fork_by(Delta, Cow, 1)).unwrap();
        reported(&vm, &below.clones[0], report::USER + 1, 1);
    }
    assert_eq!(vm.consoles.text(), "");
}

/// What `who` must read: pages from `zero.0` to `zero.1` as zero, all others as they were.
fn expect_zeros(who: &mut Obedient<'_>, zero: (u64, u64)) {
    let said = who.say(&format!("r 0 {}", pages()));
    let value = |page: u64| {
        if (zero.0..zero.1).contains(&page) {
            0
        } else {
            FIRST + page
        }
    };
    let due: Vec<_> = (0..pages())
        .map(|page| format!("= {page} {}", value(page)))
        .collect();
    let wrong = due.iter().zip(&said).find(|(due, said)| due != said);
    assert!(
        wrong.is_none() && said.len() == due.len(),
        "{}: {wrong:?}",
        who.member.name()
    );
}

/// A parent gives pages back while clones still fetch from it; each clone has what stood there at
/// its own fork.
#[test]
fn a_discard_during_a_lazy_fork_is_in_the_next_fork_and_not_in_the_one_before() {
    need_kvm!();
    for freeze in LIVE {
        let origin = Origin::new(freeze, LONG);
        let fork = || origin.fork(origin.vm.member(), freeze, 1).clones.remove(0);
        let first = fork();
        let given = origin.parent().say("d 3 5");
        assert_eq!(given, Vec::<String>::new(), "all were taken");
        let second = fork();
        origin.parent().say("d 8 4");
        let third = fork();
        expect_zeros(&mut origin.parent(), (3, 12));
        origin.parent().write(3, 7, 9);
        expect_zeros(&mut Obedient::new(&origin.vm, &third), (3, 12));
        expect_zeros(&mut Obedient::new(&origin.vm, &second), (3, 8));
        expect_zeros(&mut Obedient::new(&origin.vm, &first), (0, 0));
        origin.parent().expect(3, 7, 9);
    }
}

/// The same one level down: what a clone gives back lies in images below it, whole or not.
#[test]
fn a_clone_gives_back_pages_that_it_never_had() {
    need_kvm!();
    for freeze in LIVE {
        for mode in [Lazy, Cow] {
            let origin = Origin::new(freeze, LONG);
            let clone = origin.fork(origin.vm.member(), freeze, 2).clones;
            let mut giver = Obedient::new(&origin.vm, &clone[0]);
            assert_eq!(giver.say("d 4 6"), Vec::<String>::new());
            let below = giver
                .member
                .fork(fork_by(Delta, mode, 1))
                .unwrap()
                .clones
                .remove(0);
            expect_zeros(&mut giver, (4, 10));
            giver.write(4, 1, 6);
            // Some of them are written again, and given back again.
            let written = giver
                .member
                .fork(fork_by(Delta, mode, 1))
                .unwrap()
                .clones
                .remove(0);
            giver.say("d 0 8");
            let again = giver
                .member
                .fork(fork_by(Delta, mode, 1))
                .unwrap()
                .clones
                .remove(0);
            expect_zeros(&mut Obedient::new(&origin.vm, &below), (4, 10));
            let mut written = Obedient::new(&origin.vm, &written);
            written.expect(4, 1, 6);
            written.expect(0, FIRST, 4);
            let mut again = Obedient::new(&origin.vm, &again);
            again.expect(8, 5, 2);
            again.expect(10, FIRST + 10, pages() - 10);
            let zeros: Vec<_> = (0..8).map(|page| format!("= {page} 0")).collect();
            assert_eq!(again.say("r 0 8"), zeros);
            expect_zeros(&mut Obedient::new(&origin.vm, &clone[1]), (0, 0));
            expect_zeros(&mut origin.parent(), (0, 0));
        }
    }
}

#[test]
fn a_discard_frees_the_memory_that_it_gives_back() {
    need_kvm!();
    let origin = Origin::new(WriteProtect, LONG);
    let populated = || {
        let member = origin.vm.member();
        let populated = member
            .with_paused(|paused| paused.ram().populated().unwrap())
            .unwrap();
        populated
            .iter()
            .map(|run| (run.end - run.start) / 4096)
            .sum::<u64>()
    };
    let before = populated();
    origin.parent().say(&format!("d 0 {}", pages()));
    assert_eq!(before - populated(), pages());
}
