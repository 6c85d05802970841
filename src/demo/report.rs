//! The demo's JSON object, as the contract of the command line lays it down.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use forkvm_clone_engine::{Member, Timeline};
use serde::Serialize;

use super::answers::Answers;
use super::input::{Input, InputReport};
use super::run::{Run, between, bytes_read};
use crate::percentiles::Percentiles;

/// Times of the clones' starts, from the request of the fork on.
#[derive(Clone, Debug, Serialize)]
pub struct EndPoints {
    /// The VM object exists.
    pub built: Option<Percentiles>,
    /// State and memory are in place.
    pub restored: Option<Percentiles>,
    /// The first KVM_RUN is entered.
    pub first_run: Option<Percentiles>,
    /// The clone's first doorbell exit is seen.
    pub first_action: Option<Percentiles>,
    /// The clone's first record is seen.
    pub first_answer: Option<Percentiles>,
}

/// `target/demo.json`.
#[derive(Clone, Debug, Serialize)]
pub struct Report<Host> {
    /// Version of forkvm.
    pub forkvm: &'static str,
    /// Where it ran.
    pub host: Host,
    /// Which guest.
    pub guest: &'static str,
    /// Which job.
    pub job: &'static str,
    /// `guest` or `host`.
    pub forked_by: &'static str,
    /// RAM of each VM.
    pub memory_mib: u64,
    /// vCPUs of each VM.
    pub vcpus: u32,
    /// Clones that were made.
    pub clones: usize,
    /// Clone steps from the boot to them.
    pub depth: u32,
    /// How they map their memory.
    pub memory_mode: &'static str,
    /// How the parent's memory was kept.
    pub freeze: &'static str,
    /// Where they ran.
    pub spawner: &'static str,
    /// What was mapped.
    pub input: InputReport,
    /// What came out.
    #[serde(flatten)]
    pub answers: Answers,
    /// Seed of the simulated reads.
    pub seed: u64,
    /// How long the parent stood still; `null` for one that was stopped.
    pub parent_pause_us: Option<f64>,
    /// Populated memory at the fork.
    pub populated_mib: f64,
    /// From the request of the fork until the last clone entered its first KVM_RUN.
    pub all_running_us: Option<f64>,
    /// See [`EndPoints`].
    pub end_points_us: EndPoints,
    /// Each phase of the fork.
    pub phases_us: BTreeMap<&'static str, Percentiles>,
    /// Growth of anonymous memory while the clones worked, at most, for each of them.
    pub private_kib_per_clone: u64,
    /// Growth of the host's kernel memory, likewise, shared out over the clones and the parent.
    pub kernel_kib_per_clone: u64,
    /// Read from disk by each clone, on average.
    pub blk_read_kib_per_clone: u64,
    /// Pages that came because a clone touched them, or one beside them, or was about to. None where
    /// clones get a whole image.
    pub pages_fetched: u64,
    /// Time to serve a fault that brought pages; `null` without one.
    pub fetch_us: Option<Percentiles>,
    /// State of one clone, without memory.
    pub state_bytes: usize,
}

/// The word for where clones live.
fn spawner(clones: &[Arc<Member>]) -> &'static str {
    let apart = clones.iter().filter(|clone| clone.process().is_some());
    match apart.count() {
        0 => "in-process",
        all if all == clones.len() => "process",
        _ => "both",
    }
}

impl<Host> Report<Host> {
    /// Puts the figures of a run together.
    pub fn new(host: Host, input: &Input, seed: u64, run: &Run, answers: Answers) -> Report<Host> {
        let config = run.point.config();
        let clones = run.clones.len().max(1) as u64;
        let timelines: Vec<Timeline> = run.clones.iter().map(|clone| clone.timeline()).collect();
        let times = |end: fn(&Timeline) -> Option<std::time::Instant>| {
            timelines
                .iter()
                .filter_map(move |line| between(line.fork_requested, end(line)))
        };
        let us = |time: Duration| time.as_nanos() as f64 / 1000.0;
        let mut phases = BTreeMap::<_, Vec<Duration>>::new();
        for (phase, took) in &run.phases {
            phases.entry(phase.as_str()).or_default().push(*took);
        }
        let phases = phases.into_iter();
        Report {
            forkvm: env!("CARGO_PKG_VERSION"),
            host,
            guest: "bare",
            job: "map-reads",
            forked_by: if run.point.by_guest() {
                "guest"
            } else {
                "host"
            },
            memory_mib: config.memory_mib,
            vcpus: config.vcpus,
            clones: run.clones.len(),
            depth: run.point.depth(),
            memory_mode: run.point.memory_mode().as_str(),
            freeze: run.point.freeze().as_str(),
            spawner: spawner(&run.clones),
            input: InputReport {
                index_build_ms: run.index_build.map(|took| us(took) / 1000.0),
                ..input.report()
            },
            answers,
            seed,
            parent_pause_us: run.parent_pause.map(us),
            populated_mib: run.point.populated_mib(),
            all_running_us: times(|line| line.first_run).max().map(us),
            end_points_us: EndPoints {
                built: Percentiles::of(times(|line| line.built)),
                restored: Percentiles::of(times(|line| line.restored)),
                first_run: Percentiles::of(times(|line| line.first_run)),
                first_action: Percentiles::of(times(|line| line.first_action)),
                first_answer: Percentiles::of(times(|line| line.first_answer)),
            },
            phases_us: phases
                .filter_map(|(phase, times)| Some((phase, Percentiles::of(times)?)))
                .collect(),
            private_kib_per_clone: run.growth.private_kib / clones,
            kernel_kib_per_clone: run.growth.kernel_kib / (clones + 1),
            blk_read_kib_per_clone: run.finished.iter().map(bytes_read).sum::<u64>()
                / 1024
                / clones,
            pages_fetched: run.fetched.pages_by_fault + run.fetched.pages_by_prefetch,
            fetch_us: Percentiles::of_nanoseconds(&run.fetched.fetch_ns),
            state_bytes: run.point.state_bytes(),
        }
    }
}
