//! The demo's JSON object, as the contract lays it down.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

use super::input::{Input, PROGRAM_PACKAGE};
use super::run::{Run, Worked};
use crate::demo::run::between;
use crate::percentiles::Percentiles;

/// What was aligned.
#[derive(Clone, Debug, Serialize)]
pub struct InputReport {
    /// The program, and its package.
    pub program: &'static str,
    /// The package of the sequences.
    pub package: &'static str,
    /// How many there are.
    pub sequences: usize,
}

/// `target/demo-linux.json`.
#[derive(Clone, Debug, Serialize)]
pub struct Report<Host> {
    /// Version of forkvm.
    pub forkvm: &'static str,
    /// Where it ran.
    pub host: Host,
    /// Which guest.
    pub guest: &'static str,
    /// Version of its kernel.
    pub kernel: String,
    /// RAM of each VM.
    pub memory_mib: u64,
    /// vCPUs of each VM.
    pub vcpus: u32,
    /// Clones that were made.
    pub clones: usize,
    /// How they map their memory.
    pub memory_mode: &'static str,
    /// How the memory of the template's machine was kept.
    pub freeze: &'static str,
    /// What was aligned.
    pub input: InputReport,
    /// Whether each clone's alignment is the host's, byte by byte.
    pub answers_match: bool,
    /// From the boot of the template's machine to its agent's answer, in milliseconds.
    pub boot_ms: Value,
    /// The same until it was saved.
    pub template_ms: Value,
    /// From the request of the fork until a clone's agent had taken on its identity, in milliseconds.
    pub clone_to_answer_ms: Option<Percentiles>,
    /// From the start of the program in a clone until its output was whole, in milliseconds.
    pub program_ms: Option<Percentiles>,
    /// Phases of the fork, and of each clone's way to its agent's answer: `agent` from its first KVM_RUN on, of which the
    /// guest's clock counted the parts `agent/…`.
    pub phases_us: BTreeMap<String, Percentiles>,
    /// Instructions that were carried out for KVM in the clones; empty where KVM needs no help.
    pub fallback: BTreeMap<String, u64>,
    /// What runs the vCPUs.
    pub cpu_backend: &'static str,
}

impl<Host> Report<Host> {
    /// Puts the figures of a run together. `expected` is what the host made of each share.
    pub fn new(
        host: Host,
        kernel: &str,
        input: &Input,
        expected: &[Vec<u8>],
        run: &Run,
    ) -> Report<Host> {
        let config = run.fork.point.config();
        let about = &run.template.manifest().about;
        let answers = run.clones.iter().map(|clone| &clone.answer);
        Report {
            forkvm: env!("CARGO_PKG_VERSION"),
            host,
            guest: "linux",
            kernel: kernel.into(),
            memory_mib: config.memory_mib,
            vcpus: config.vcpus,
            clones: run.clones.len(),
            memory_mode: run.fork.point.memory_mode().as_str(),
            freeze: run.fork.point.freeze().as_str(),
            input: InputReport {
                program: PROGRAM_PACKAGE,
                package: input.package(),
                sequences: input.sequences,
            },
            answers_match: answers.eq(expected),
            boot_ms: about["boot_ms"].clone(),
            template_ms: about["template_ms"].clone(),
            clone_to_answer_ms: milliseconds(run.clones.iter().filter_map(|clone| {
                let answered = clone.vm.introduced().at;
                between(clone.vm.timeline().fork_requested, Some(answered))
            })),
            program_ms: milliseconds(run.clones.iter().map(|clone| clone.took)),
            phases_us: phases(run),
            fallback: fallback(&run.clones),
            cpu_backend: "kvm",
        }
    }
}

fn milliseconds(times: impl Iterator<Item = Duration>) -> Option<Percentiles> {
    let times: Vec<f64> = times.map(|time| time.as_secs_f64() * 1000.0).collect();
    Percentiles::of_values(&times, 0.0)
}

fn phases(run: &Run) -> BTreeMap<String, Percentiles> {
    let mut phases = BTreeMap::<String, Vec<Duration>>::new();
    let mut add = |phase: &str, took| phases.entry(phase.to_owned()).or_default().push(took);
    for (phase, took) in &run.fork.phases {
        add(phase.as_str(), *took);
    }
    for clone in &run.clones {
        let introduced = clone.vm.introduced();
        let (line, answered) = (clone.vm.timeline(), Some(introduced.at));
        if let Some(took) = between(line.first_run, answered) {
            add("agent", took);
        }
        for step in &introduced.identified.steps {
            let took = Duration::from_micros(step.us);
            add(&format!("agent/{}", step.step), took);
        }
    }
    let phases = phases.into_iter();
    phases
        .filter_map(|(phase, times)| Some((phase, Percentiles::of(times)?)))
        .collect()
}

fn fallback(clones: &[Worked]) -> BTreeMap<String, u64> {
    let mut all = BTreeMap::new();
    for clone in clones {
        match clone.vm.member().fallback_counts() {
            Ok(counts) => {
                for (instruction, count) in counts.unwrap_or_default() {
                    *all.entry(instruction).or_default() += count;
                }
            }
            Err(error) => {
                let vm = clone.vm.identity().name;
                tracing::warn!(%error, vm, "what was carried out for it is not known");
            }
        }
    }
    all
}
