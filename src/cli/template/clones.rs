//! `forkvm fork TEMPLATE -n N -- PROGRAM`: clones of a template, a program in each, and the end of all.
//!
//! The template's machine is restored in this process and forked; the clones end with the programs, or with this process.

use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use forkvm::engine::Family;
use forkvm::linux::LinuxVm;
use forkvm::templates::Template;
use forkvm::vmm::Kvm;
use forkvm::{CloneSpec, FamilyConfig, MemoryMode, VsockSpec};
use serde_json::json;

use super::each::{Place, run_in_each};
use super::end_when_asked;
use crate::cli::output::{Outcome, Output};
use crate::cli::progress::Progress;
use crate::cli::stop::Stop;

/// See the module's text. `spec` says how many clones, and how they get their memory; so does the machine.
pub(crate) fn fork(
    template: &Template,
    spec: CloneSpec,
    program: &[String],
    output: &Output,
) -> anyhow::Result<Outcome> {
    let sockets = tempfile::tempdir().context("making a directory for sockets")?;
    let config = FamilyConfig {
        vsock: Some(VsockSpec {
            path: sockets.path().join("vsock"),
        }),
        ..FamilyConfig::default()
    };
    let family = Family::new(Arc::new(Kvm::open()?), config);
    let stop = Stop::on_signals().context("hearing signals")?;
    end_when_asked(&stop, &family).context("starting a thread")?;
    let ran = run(&family, template, spec, program, output);
    family.end();
    match (ran, stop.exit_code()) {
        (Ok(outcome), Some(status)) => Ok(Outcome { status, ..outcome }),
        (Ok(outcome), None) => Ok(outcome),
        (Err(error), _) => stop.outcome(error),
    }
}

fn run(
    family: &Arc<Family>,
    template: &Template,
    spec: CloneSpec,
    program: &[String],
    output: &Output,
) -> anyhow::Result<Outcome> {
    let start = Instant::now();
    let vm = restore(family, template, spec.memory_mode)?;
    let restored_ms = start.elapsed().as_millis() as u64;
    let clones = vm.fork(spec).context("forking the template's machine")?;
    let clones_ms = start.elapsed().as_millis() as u64 - restored_ms;
    let place = |(number, clone): (u32, &LinuxVm)| Place {
        vm: clone.identity().name,
        clone_id: number,
        agent: clone.agent().clone(),
    };
    let places: Vec<Place> = (1..).zip(&clones).map(place).collect();
    let ran = run_in_each(&places, program, output)?;
    Ok(Outcome {
        status: ran.worst(),
        report: json!({
            "template": template.name(),
            "clones": ran.to_json(),
            "restored_ms": restored_ms,
            "clones_ms": clones_ms,
            "took_ms": start.elapsed().as_millis() as u64,
        }),
    })
}

fn restore(family: &Arc<Family>, template: &Template, mode: MemoryMode) -> anyhow::Result<LinuxVm> {
    let (family, name) = (family.clone(), Some(template.name()));
    let mut bar = Progress::new("loading memory");
    LinuxVm::restore(family, template.machine()?, name, mode, &mut |progress| {
        bar.update(progress.done, progress.total);
    })
    .with_context(|| format!("restoring {}", template.name()))
}
