//! Several vCPUs ask for a fork at the same time. The calls are served one after the other; in the
//! clones of one call, every other call that was pending fails with EAGAIN and is never executed.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use forkvm::End;
use forkvm::abi::errno::EAGAIN;
use forkvm::devices::device::GuestOp;
use forkvm::engine::{Phase, Vetoed};

use crate::common::{Setup, expect_end, need_kvm};

/// Slots whose calls were pending when each fork was saved.
type Pending = Arc<Mutex<Vec<BTreeSet<u32>>>>;

/// Forks fail, and the guest rings again, until all vCPUs ring at once.
fn boot_and_ring(vcpus: u32) -> (crate::common::Guest, Pending) {
    let pending = Pending::default();
    let all_rang = AtomicBool::new(false);
    let seen = pending.clone();
    let vm = Setup::new("job=ring")
        .vcpus(vcpus)
        .hook(move |phase, paused| {
            if phase == Phase::Request && !all_rang.load(Ordering::Relaxed) {
                // The others ring meanwhile: their vCPUs run.
                thread::sleep(Duration::from_millis(3));
            }
            if phase == Phase::Save
                && let Some(paused) = paused
            {
                let calls = paused.doorbell().pending();
                assert!(calls.iter().all(|call| call.op == GuestOp::Fork(1)));
                all_rang.fetch_or(calls.len() == vcpus as usize, Ordering::Relaxed);
                if !all_rang.load(Ordering::Relaxed) {
                    return Err(Vetoed("not all vCPUs have rung yet".into()));
                }
                seen.lock()
                    .unwrap()
                    .push(calls.iter().map(|call| call.slot).collect());
            }
            Ok(())
        });
    let vm = vm.boot();
    expect_end(&vm, vm.member(), End::Exited(0));
    vm.log
        .clones()
        .iter()
        .for_each(|clone| expect_end(&vm, clone, End::Exited(0)));
    (vm, pending)
}

/// What the vCPUs of VM `name` were answered.
fn answers(text: &str, name: &str) -> Vec<i64> {
    let line = text
        .lines()
        .find(|line| line.starts_with(&format!("{name}: ring ")));
    let line = line.unwrap_or_else(|| panic!("{name} says nothing\n{text}"));
    let list = line
        .split_once("answers=[")
        .unwrap()
        .1
        .trim_end_matches(']');
    list.split(", ")
        .map(|number| number.parse().unwrap())
        .collect()
}

fn check(vcpus: u32) {
    need_kvm!();
    let (vm, pending) = boot_and_ring(vcpus);
    let text = vm.consoles.text();
    let pending = pending.lock().unwrap().clone();
    let counts: Vec<_> = pending.iter().map(BTreeSet::len).collect();
    let one_less_each_time: Vec<_> = (1..=vcpus as usize).rev().collect();
    assert_eq!(counts, one_less_each_time, "served one after the other");
    assert_eq!(
        answers(&text, "vm"),
        vec![0; vcpus as usize],
        "the parent's calls all succeed"
    );

    let clones = vm.log.clones();
    assert_eq!(
        clones.len(),
        vcpus as usize,
        "no call was executed in a clone\n{text}"
    );
    let mut served = BTreeSet::new();
    for (clone, pending) in clones.iter().zip(&pending) {
        let answers = answers(&text, clone.name());
        let forker = answers.iter().position(|&answer| answer == 1).unwrap() as u32;
        assert!(pending.contains(&forker));
        for (slot, &answer) in (0..).zip(&answers) {
            let expected = match slot {
                _ if slot == forker => 1,
                _ if pending.contains(&slot) => -EAGAIN,
                // Answered before this fork, in the parent.
                _ => 0,
            };
            assert_eq!(answer, expected, "slot {slot} in {}\n{text}", clone.name());
        }
        assert!(served.insert(forker), "each call was served once");
    }
}

#[test]
fn on_2_vcpus() {
    check(2);
}

#[test]
fn on_4_vcpus() {
    check(4);
}
