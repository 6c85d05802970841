//! The figures that forkvm is about, measured on the embedded guest and printed. Nothing is
//! asserted: what a time is worth is for whoever knows the host.
//!
//!     cargo bench --bench fork [-- instantiate | remap | fanout | request | memory | pause | first-action | page]

#[path = "../tests/common/mod.rs"]
mod common;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use forkvm::abi::doorbell::report;
use forkvm::engine::accounting::{HostKernelUse, ProcessUse};
use forkvm::engine::{Member, Phase};
use forkvm::vmm::Kvm;
use forkvm::{CloneSpec, End, ForkPoint, FreezeKind, MemoryMode};

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

/// As [`print_times`], in nanoseconds.
fn print_times_ns(name: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    let at = |percent: usize| times[(times.len() - 1) * percent / 100].as_nanos();
    let (kvm, n) = (Kvm::open().unwrap().flavour(), times.len());
    println!(
        "{name}: p50 {} ns, p90 {} ns, min {} ns, max {} ns (n={n}, KVM flavour {kvm})",
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

/// Whether a fork can be granted is asked while somebody waits for it, in a process with many VMs too.
fn request_beside_other_vms() {
    // A guest that can be forked any number of times.
    let vm = Setup::new("job=obey pages=16").memory_mib(512).boot();
    vm.wait_ready(LONG).unwrap();
    let point = keep(&vm);
    for others in [0, scaled(300, 4)] {
        let others = match others {
            0 => Vec::new(),
            count => point.spawn(count).unwrap(),
        };
        let before = vm.log.phases().len();
        for _ in 0..scaled(50, 2) {
            drop(vm.fork_point(CloneSpec::new(1)).unwrap());
        }
        let phases = vm.log.phases().into_iter().skip(before);
        let requests = phases.filter(|(phase, _)| *phase == Phase::Request);
        let name = format!("request, beside {} other VMs", others.len() + 1);
        print_times(&name, requests.map(|(_, took)| took).collect());
    }
}

/// What an idle clone takes at its first action: by the kernel's accounts, of the process and of the
/// whole host, and by what the engine says of each VM. The constants of the engine's limits come from
/// here (clone-engine/src/accounting/idle.rs); the host must do nothing else.
fn memory_of_idle_clones() {
    let usage = || (ProcessUse::now().unwrap(), HostKernelUse::now().unwrap());
    for (memory_mib, mib, vcpus) in [(512, 64, 1), (512, 64, 4), (64, 16, 1)] {
        let vm = Setup::new(format!("job=touch mib={mib} idle=1"))
            .memory_mib(memory_mib)
            .vcpus(vcpus)
            .boot();
        vm.wait_ready(LONG).unwrap();
        let point = keep(&vm);
        // The allocator's own, once.
        wait_for_action(&point.spawn(1).unwrap()[0]);
        let count = scaled(100, 8);
        let before = usage();
        let clones = point.spawn(count).unwrap();
        for clone in &clones {
            wait_for_action(clone);
        }
        let after = usage();
        let each = |after: u64, before: u64| (after as f64 - before as f64) / f64::from(count);
        let (process, kernel) = (after.0, after.1);
        println!("an idle clone of a VM with {memory_mib} MiB, {vcpus} vCPUs (n={count}), in KiB:");
        println!(
            "  process: private {:.1}, page tables {:.1}",
            each(process.anonymous_kib, before.0.anonymous_kib),
            each(process.page_tables_kib, before.0.page_tables_kib),
        );
        println!(
            "  host's kernel: {:.1}: slab {:.1}, vmalloc {:.1}, page tables {:.1}, for guests {:.1}, \
             percpu {:.1}",
            each(kernel.total_kib(), before.1.total_kib()),
            each(kernel.slab_kib, before.1.slab_kib),
            each(kernel.vmalloc_kib, before.1.vmalloc_kib),
            each(kernel.page_tables_kib, before.1.page_tables_kib),
            each(kernel.guest_page_tables_kib, before.1.guest_page_tables_kib),
            each(kernel.percpu_kib, before.1.percpu_kib),
        );
        let start = Instant::now();
        let uses: Vec<_> = clones
            .iter()
            .map(|clone| clone.memory_use().unwrap())
            .collect();
        println!("  one VM: {:?}, in {:?}", uses[0], start.elapsed() / count);
    }
}

/// A clone's time to read `pages` pages in order, each checked, divided by them.
fn page_time(clone: &Member, pages: u32) -> Duration {
    clone.wait_report(report::ANSWER, 1, LONG).unwrap();
    let times = clone.timeline();
    (times.first_answer.unwrap() - times.first_action.unwrap()) / pages
}

/// A parent of 512 MiB whose clones fetch what they touch, and nothing else comes into the image.
fn reach(cmdline: &str) -> Setup {
    Setup::new(format!("job=reach mib=64 {cmdline}"))
        .memory_mib(512)
        .no_copier()
}

fn a_page_of_a_cold_lazy_clone_and_of_a_sibling_after_it() {
    let pages = scaled(8192, 256);
    for order in ["linear", "scattered"] {
        let (mut cold, mut sibling, mut cow) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..scaled(10, 1) {
            let vm = reach(&format!("touch={pages} order={order}")).boot();
            vm.wait_ready(LONG).unwrap();
            let spec = |memory_mode| CloneSpec {
                memory_mode,
                ..CloneSpec::new(1)
            };
            let point = vm.fork_point(spec(MemoryMode::Lazy)).unwrap();
            cold.push(page_time(&point.spawn(1).unwrap()[0], pages));
            sibling.push(page_time(&point.spawn(1).unwrap()[0], pages));
            let point = vm.fork_point(spec(MemoryMode::Cow)).unwrap();
            cow.push(page_time(&point.spawn(1).unwrap()[0], pages));
        }
        print_times_ns(&format!("{order} page of a cold lazy clone"), cold);
        print_times_ns(&format!("{order} page of its sibling afterwards"), sibling);
        print_times_ns(&format!("{order} page of a clone of a whole image"), cow);
    }
}

fn first_action_of_a_cold_lazy_clone() {
    let vm = reach("touch=1").boot();
    vm.wait_ready(LONG).unwrap();
    for (name, memory_mode) in [("lazy", MemoryMode::Lazy), ("cow", MemoryMode::Cow)] {
        let mut times = Vec::new();
        for _ in 0..scaled(30, 3) {
            let spec = CloneSpec {
                memory_mode,
                ..CloneSpec::new(1)
            };
            let point = vm.fork_point(spec).unwrap();
            let clone = point.spawn(1).unwrap().remove(0);
            let action = wait_for_action(&clone);
            times.push(action - clone.timeline().spawn_requested.unwrap());
            clone.kill();
            expect_end(&vm, &clone, End::Killed);
        }
        print_times(
            &format!("instantiate, unpooled, first guest action, {name}"),
            times,
        );
    }
}

/// The pauses of a VM that is forked by `freeze`, `warm_up` first.
fn pauses(
    job: &str,
    memory_mib: u64,
    warm_up: Option<FreezeKind>,
    freeze: FreezeKind,
) -> Vec<Duration> {
    let mut pauses = Vec::new();
    for _ in 0..scaled(10, 1) {
        let vm = Setup::new(job).memory_mib(memory_mib).no_copier().boot();
        vm.wait_ready(LONG).unwrap();
        let spec = |freeze: FreezeKind| CloneSpec {
            freeze,
            memory_mode: freeze.serves()[freeze.serves().len() - 1],
            ..CloneSpec::new(1)
        };
        let mut points = Vec::new();
        if let Some(freeze) = warm_up {
            points.push(vm.fork_point(spec(freeze)).unwrap());
            // The guest rewrites its working set on each fork.
            vm.member().wait_report(report::READY, 2, LONG).unwrap();
        }
        let before = vm.log.pauses().len();
        points.push(vm.fork_point(spec(freeze)).unwrap());
        pauses.push(vm.log.pauses()[before]);
    }
    pauses
}

fn pause_by_freeze() {
    let job = "job=touch mib=256 idle=1";
    for freeze in [
        FreezeKind::WriteProtect,
        FreezeKind::Remap,
        FreezeKind::Copy,
    ] {
        let name = format!("parent pause by {freeze}, 256 MiB populated of 512");
        print_times(&name, pauses(job, 512, None, freeze));
    }
    let name = "parent pause by write-protect, 64 MiB populated of 8192";
    let times = pauses(
        "job=touch mib=64 idle=1",
        8192,
        None,
        FreezeKind::WriteProtect,
    );
    print_times(name, times);
    let name = "parent pause by delta, 8 MiB dirty of 512 (64 populated)";
    let times = pauses(
        "job=touch mib=64 idle=1 redirty=8",
        512,
        Some(FreezeKind::Remap),
        FreezeKind::Delta,
    );
    print_times(name, times);
}

/// One group of figures, by a word to choose it with.
type Group = (&'static str, fn());

const GROUPS: [Group; 8] = [
    ("instantiate", instantiate_one_clone_to_its_first_action),
    ("remap", pause_of_a_parent_by_remap_with_100_mib_populated),
    ("fanout", thirty_two_clones_run_after_the_fork_point_exists),
    ("request", request_beside_other_vms),
    ("memory", memory_of_idle_clones),
    ("pause", pause_by_freeze),
    ("first-action", first_action_of_a_cold_lazy_clone),
    (
        "page",
        a_page_of_a_cold_lazy_clone_and_of_a_sibling_after_it,
    ),
];

fn main() {
    need_kvm!();
    let chosen: Vec<String> = std::env::args()
        .skip(1)
        .filter(|arg| !arg.starts_with('-'))
        .collect();
    for (name, measure) in GROUPS {
        if chosen.is_empty() || chosen.iter().any(|word| word == name) {
            measure();
        }
    }
}
