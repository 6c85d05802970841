//! Who a machine is: what must differ between parent and clones, and what time it is there.

use std::collections::BTreeSet;
use std::time::{SystemTime, UNIX_EPOCH};

use forkvm::{CloneSpec, FreezeKind, MemoryMode};

use super::common::{fork_by, need_kvm};
use super::machine::{Machine, sh};

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs()
}

fn clones_are_told_from_each_other(spec: CloneSpec) {
    need_kvm!();
    let machine = Machine::restore(1);
    let count = spec.count as usize;
    let clones = machine.fork(spec);
    let everybody = || clones.iter().chain([&machine.vm]);
    // Each word of what one program says is of another kind.
    // The shell's own words: a program more in each VM costs much where ring 0 is interpreted.
    let script = "for i in kernel/hostname kernel/random/uuid; do read -r word < /proc/sys/$i; echo $word; done; \
                  read -r word < /etc/machine-id; echo $word; forkvm-guest id";
    let said: Vec<String> = everybody().map(|vm| sh(vm, script)).collect();
    for kind in 0..4 {
        let words: BTreeSet<&str> = said
            .iter()
            .filter_map(|all| all.lines().nth(kind))
            .collect();
        assert_eq!(words.len(), count + 1, "{said:?}");
    }
    let cids: BTreeSet<_> = everybody().map(|vm| vm.identity().cid).collect();
    assert_eq!(cids.len(), count + 1);
    for (number, said) in (1..=count).zip(&said) {
        assert!(said.starts_with(&format!("linux-{number}\n")), "{said}");
    }
}

#[test]
fn eight_clones_have_eight_identities_and_random_numbers_of_their_own() {
    clones_are_told_from_each_other(CloneSpec::new(8));
}

#[test]
fn lazy_clones_have_identities_and_random_numbers_of_their_own() {
    let spec = fork_by(FreezeKind::WriteProtect, MemoryMode::Lazy, 2);
    clones_are_told_from_each_other(spec);
}

#[test]
fn a_machine_that_was_saved_long_ago_has_the_time_of_its_host_and_its_own_clock_goes_on() {
    need_kvm!();
    let machine = Machine::restore(1);
    let uptime = |vm| -> f64 { sh(vm, "cut -d' ' -f1 /proc/uptime").parse().unwrap() };
    let source = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    assert_eq!(sh(&machine, &format!("cat {source}")), "kvm-clock");
    sh(&machine, "date -s @1000000000");
    let before = uptime(&machine);
    let clone = machine.fork(CloneSpec::new(1)).remove(0);
    let (earliest, date) = (now(), sh(&clone, "date +%s").parse::<u64>().unwrap());
    assert!((earliest..=now()).contains(&date), "{date}, at {earliest}");
    assert!(uptime(&clone) >= before);
    // Nobody has told the parent anything.
    assert!(sh(&machine, "date +%s").parse::<u64>().unwrap() < 1_000_001_000);
}
