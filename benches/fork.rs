//! The figures that forkvm is about, measured on the embedded guest and printed. Nothing is
//! asserted: what a time is worth is for whoever knows the host.
//!
//!     cargo bench --bench fork

#[path = "../tests/common/mod.rs"]
mod common;

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use forkvm::abi::doorbell::report;
use forkvm::engine::{Member, Phase};
use forkvm::vmm::Kvm;
use forkvm::{CloneSpec, End, ForkPoint, FreezeKind};

use common::{Guest, LONG, Setup, expect_end, need_kvm, scaled};

/// A guest of 512 MiB that has written `mib` MiB and waits for a fork. Its clones show that they
/// run, and halt.
fn warm(mib: u32) -> Guest {
    let vm = Setup::new(format!("job=touch mib={mib} idle=1"))
        .memory_mib(512)
        .boot();
    vm.wait_ready(LONG).unwrap();
    vm
}

fn keep(vm: &Guest) -> std::sync::Arc<ForkPoint> {
    vm.fork_point(CloneSpec {
        freeze: FreezeKind::Remap,
        ..CloneSpec::new(1)
    })
    .unwrap()
}

/// `name: p50 … p90 … max … (n)`, in microseconds.
fn print_times(name: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    let at = |percent: usize| times[(times.len() - 1) * percent / 100].as_micros();
    let (kvm, n) = (Kvm::open().unwrap().flavour(), times.len());
    println!(
        "{name}: p50 {} us, p90 {} us, min {} us, max {} us (n={n}, KVM flavour {kvm})",
        at(50),
        at(90),
        at(0),
        at(100),
    );
}

fn wait_for_action(clone: &Member) -> Instant {
    clone.wait_report(report::ACTION, 1, LONG).unwrap();
    clone.timeline().first_action.unwrap()
}

/// `Anonymous` of this process, in KiB.
fn anonymous_kib() -> u64 {
    let rollup = fs::read_to_string("/proc/self/smaps_rollup").unwrap();
    let line = rollup
        .lines()
        .find_map(|line| line.strip_prefix("Anonymous:"));
    line.unwrap()
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .unwrap()
}

fn instantiate_one_clone_to_its_first_action() {
    let vm = warm(64);
    let point = keep(&vm);
    let (mut to_action, mut to_built, mut to_restored, mut to_first_run) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..scaled(100, 5) {
        let clone = point.spawn(1).unwrap().remove(0);
        let action = wait_for_action(&clone);
        let times = clone.timeline();
        clone.kill();
        expect_end(&vm, &clone, End::Killed);
        let start = times.spawn_requested.unwrap();
        to_built.push(times.built.unwrap() - start);
        to_restored.push(times.restored.unwrap() - start);
        to_first_run.push(times.first_run.unwrap() - start);
        to_action.push(action - start);
    }
    print_times("instantiate, VM object built", to_built);
    print_times("instantiate, state restored", to_restored);
    print_times("instantiate, first KVM_RUN", to_first_run);
    print_times("instantiate, first guest action", to_action);
}

fn pause_of_a_parent_by_remap_with_100_mib_populated() {
    let (mut pauses, mut phases) = (Vec::new(), BTreeMap::<Phase, Vec<Duration>>::new());
    for _ in 0..scaled(10, 1) {
        let vm = warm(100);
        keep(&vm);
        pauses.extend(vm.log.pauses());
        let of_the_pause =
            |(phase, _): &(Phase, Duration)| (Phase::Pause..=Phase::Resume).contains(phase);
        for (phase, took) in vm.log.phases().into_iter().filter(of_the_pause) {
            phases.entry(phase).or_default().push(took);
        }
    }
    print_times("parent pause by remap, 100 MiB populated", pauses);
    for (phase, took) in phases {
        print_times(&format!("  of it, {phase}"), took);
    }
}

fn thirty_two_clones_run_after_the_fork_point_exists() {
    let (mut let_go, mut first_run, mut first_action) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..scaled(10, 1) {
        let vm = warm(64);
        let point = keep(&vm);
        let start = Instant::now();
        let clones = point.spawn(32).unwrap();
        let_go.push(start.elapsed());
        let last = clones.iter().map(|clone| wait_for_action(clone)).max();
        first_action.push(last.unwrap() - start);
        let last = clones
            .iter()
            .filter_map(|clone| clone.timeline().first_run)
            .max();
        first_run.push(last.unwrap() - start);
    }
    print_times("32 clones, all let go", let_go);
    print_times("32 clones, first KVM_RUN of the last", first_run);
    print_times("32 clones, first guest action of the last", first_action);
}

fn private_memory_of_an_idle_clone_at_its_first_action() {
    let vm = warm(64);
    let point = keep(&vm);
    // The allocator's own, once.
    wait_for_action(&point.spawn(1).unwrap()[0]);
    let count = 32;
    let before = anonymous_kib();
    for clone in point.spawn(count).unwrap() {
        wait_for_action(&clone);
    }
    let each = (anonymous_kib() - before) / u64::from(count);
    println!("private memory of an idle clone at its first action: {each} KiB");
}

fn main() {
    need_kvm!();
    instantiate_one_clone_to_its_first_action();
    pause_of_a_parent_by_remap_with_100_mib_populated();
    thirty_two_clones_run_after_the_fork_point_exists();
    private_memory_of_an_idle_clone_at_its_first_action();
}
