//! `forkvm pause`, `resume`, `save`, `fork`, `stop`, `kill` and `wait`: what a machine is told to do.

use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use forkvm::agent::REQUEST_LIMIT;
use forkvm::templates::{Template, TemplateError, Templates};
use forkvm::{CloneSpec, FreezeKind, MemoryMode};
use serde_json::{Value, json};

use super::super::control::client::Connection;
use super::super::control::place::Places;
use super::super::control::protocol::Request;
use super::super::errors::Usage;
use super::super::fork_options::{freezes, modes};
use super::super::output::{Outcome, Output};
use super::super::run::vm_name;
use super::super::template::{self, Place};
use super::exec::{agent_of, agent_within};
use super::{ask, text};

/// How long the end of a machine is waited for that was switched off at the last moment.
const LAST_LOOK: Duration = Duration::from_millis(100);

const PAUSE: &str = "\
Examples:
  forkvm pause web
  forkvm pause web && forkvm fork web -n 8      the clones run, and web stays paused

It stands until `forkvm resume`: also through forks, a save that fails, a look. What its guest asks the
host for meanwhile waits. The clock goes on: the guest sees that time has passed.";

const RESUME: &str = "\
Examples:
  forkvm resume web
  forkvm resume web.3                  a clone as well";

const SAVE: &str = "\
Examples:
  forkvm save web DIR                  web is saved to DIR, and ends
  forkvm save web.3 DIR                a clone as well
  forkvm restore DIR --name web        ... and this lets it run on

DIR appears whole or not at all. If the save fails the machine goes on as before. Clones of it run on.";

const FORK: &str = "\
Examples:
  forkvm fork web -n 8                 web.1 to web.8, which go on from this very instant
  forkvm fork web.3                    a clone of a clone: web.3.1
  forkvm fork web -n 8 --memory-mode lazy
  for vm in $(forkvm fork web -n 4 --json - | jq -r '.clones[]'); do forkvm wait $vm; done

All of them run, or none and the machine goes on as before. A clone runs also where the machine is paused.

With a program, in machines with forkvm's agent:
  forkvm fork web -n 8 -- sh -c 'echo I am $FORKVM_CLONE_ID'

It runs in each clone, its output line by line behind the clone's name. The command ends with the worst of its
statuses, and the clones end then. X may be a template as well (`forkvm template create`); a machine that runs is taken first.";

const STOP: &str = "\
Examples:
  forkvm stop web
  forkvm stop web.3 --timeout 10 || forkvm kill web.3

Its agent ends the programs, leaves the disks clean and switches the machine off, as poweroff(8) does. Clones of it run
on. The command returns when it is off, and ends as `forkvm wait` does: with 0 for a machine that was switched off. One that is
not off in time is left to it, and the command fails.";

const KILL: &str = "\
Examples:
  forkvm kill web                      its clones run on, as processes do
  forkvm kill web.3

Returns when it is gone. `kill -TERM` of the process that runs it (`forkvm ps`) ends the whole family.";

const WAIT: &str = "\
Examples:
  forkvm wait web
  forkvm wait web.3; echo $?           the status that its guest ended with

Ends with the status of the VM, 255 for a larger one, 1 when it failed or triple-faulted, 137 when it was killed. A clone
that has ended already is known as long as its family's process runs.";

/// Which machine.
#[derive(Debug, Args)]
struct Which {
    /// The machine, such as `web`, or a clone of it, such as `web.3`
    #[arg(value_parser = vm_name)]
    vm: String,
}

/// Options of `pause`.
#[derive(Debug, Args)]
#[command(after_help = PAUSE)]
pub(crate) struct Pause {
    #[command(flatten)]
    which: Which,
}

/// Options of `resume`.
#[derive(Debug, Args)]
#[command(after_help = RESUME)]
pub(crate) struct Resume {
    #[command(flatten)]
    which: Which,
}

/// Options of `save`.
#[derive(Debug, Args)]
#[command(after_help = SAVE)]
pub(crate) struct Save {
    #[command(flatten)]
    which: Which,
    /// The directory to make
    dir: PathBuf,
}

/// Options of `fork`.
#[derive(Debug, Args)]
#[command(after_help = FORK)]
pub(crate) struct Fork {
    #[command(flatten)]
    which: Which,
    /// Clones
    #[arg(short = 'n', long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    count: u32,
    /// How the clones get their memory [default: as the machine was started with]
    #[arg(long, value_name = "MODE", value_parser = modes())]
    memory_mode: Option<MemoryMode>,
    /// How the fork keeps the machine's memory
    #[arg(long, value_name = "FREEZE", default_value = "auto", value_parser = freezes())]
    freeze: FreezeKind,
    /// What to run in each clone; they end with it
    #[arg(last = true)]
    program: Vec<String>,
}

/// Options of `stop`.
#[derive(Debug, Args)]
#[command(after_help = STOP)]
pub(crate) struct Stop {
    #[command(flatten)]
    which: Which,
    /// How long it may take, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..))]
    timeout: u64,
}

/// Options of `kill`.
#[derive(Debug, Args)]
#[command(after_help = KILL)]
pub(crate) struct Kill {
    #[command(flatten)]
    which: Which,
}

/// Options of `wait`.
#[derive(Debug, Args)]
#[command(after_help = WAIT)]
pub(crate) struct Wait {
    #[command(flatten)]
    which: Which,
}

impl Pause {
    pub(crate) fn run(self, _output: &Output) -> anyhow::Result<Outcome> {
        let vm = self.which.vm;
        ask(&vm, &Request::Pause { vm: vm.clone() }).map(Outcome::done)
    }
}

impl Resume {
    pub(crate) fn run(self, _output: &Output) -> anyhow::Result<Outcome> {
        let vm = self.which.vm;
        ask(&vm, &Request::Resume { vm: vm.clone() }).map(Outcome::done)
    }
}

impl Save {
    pub(crate) fn run(self, _output: &Output) -> anyhow::Result<Outcome> {
        let vm = self.which.vm;
        // The process that saves it has a working directory of its own.
        let dir = std::path::absolute(&self.dir);
        let dir = dir.with_context(|| format!("finding {}", self.dir.display()))?;
        let request = Request::Save {
            vm: vm.clone(),
            dir,
        };
        let saved = ask(&vm, &request)?;
        eprintln!(
            "forkvm: `forkvm restore {}` lets it run on",
            self.dir.display()
        );
        Ok(Outcome::done(saved))
    }
}

impl Fork {
    pub(crate) fn run(self, output: &Output) -> anyhow::Result<Outcome> {
        if let Some(mode) = self.memory_mode {
            self.freeze
                .check(mode)
                .map_err(|error| Usage(error.to_string()))?;
        }
        if let Some(template) = self.template()? {
            let spec = CloneSpec {
                memory_mode: self.memory_mode.unwrap_or_default(),
                freeze: self.freeze,
                ..CloneSpec::new(self.count)
            };
            return template::fork(&template, spec, &self.program, output);
        }
        let vm = self.which.vm;
        let request = Request::Fork {
            vm: vm.clone(),
            count: self.count,
            memory_mode: self.memory_mode,
            freeze: Some(self.freeze),
        };
        let forked = ask(&vm, &request)?;
        if !self.program.is_empty() {
            return run_in_clones(forked, &self.program, output);
        }
        let mut out = output.text();
        for clone in forked["clones"].as_array().into_iter().flatten() {
            writeln!(out, "{}", clone.as_str().unwrap_or_default())?;
        }
        Ok(Outcome::done(forked))
    }

    /// The template of that name, where a program is to run and no such machine runs.
    fn template(&self) -> anyhow::Result<Option<Template>> {
        let name = &self.which.vm;
        if self.program.is_empty() || Places::of_user()?.holder(name)?.is_some() {
            return Ok(None);
        }
        match Templates::of_user()?.find(name) {
            // Of a clone, such as `web.3`, or of nothing.
            Err(TemplateError::Unknown { .. }) => Ok(None),
            found => Ok(Some(found?)),
        }
    }
}

/// Runs `program` in clones that were just made, and ends them.
fn run_in_clones(forked: Value, program: &[String], output: &Output) -> anyhow::Result<Outcome> {
    let clones = forked["clones"].as_array().into_iter().flatten();
    let clones: Vec<&str> = clones.filter_map(Value::as_str).collect();
    let place = |(clone_id, vm): (u32, &&str)| {
        let vm = (*vm).to_owned();
        anyhow::Ok(Place {
            agent: agent_of(&vm)?,
            vm,
            clone_id,
        })
    };
    let places: anyhow::Result<Vec<Place>> = (1..).zip(&clones).map(place).collect();
    let ran = places.and_then(|places| template::run_in_each(&places, program, output));
    for vm in &clones {
        let vm = (*vm).to_owned();
        if let Err(error) = ask(&vm, &Request::Kill { vm: vm.clone() }) {
            // It may have ended itself.
            tracing::debug!(%error, vm, "a clone is not killed");
        }
    }
    let ran = ran?;
    Ok(Outcome {
        status: ran.worst(),
        report: json!({ "clones": ran.to_json() }),
    })
}

impl Stop {
    pub(crate) fn run(self, _output: &Output) -> anyhow::Result<Outcome> {
        let vm = self.which.vm;
        let limit = Duration::from_secs(self.timeout);
        let deadline = Instant::now() + limit;
        let agent = agent_within(&vm, limit.min(REQUEST_LIMIT))?;
        // Before it can end: the name is free a moment after.
        let mut waiting = Connection::to(&vm)?;
        waiting.begin(&Request::Wait { vm: vm.clone() })?;
        let what = || format!("switching {vm} off");
        agent.power_off().with_context(what)?;
        // A last look where the agent took all of the time.
        let left = deadline.saturating_duration_since(Instant::now());
        let end = waiting.answer_within(left.max(LAST_LOOK))?;
        let end = end.with_context(|| {
            let seconds = self.timeout;
            format!("{vm} is not off after {seconds} s: `forkvm kill {vm}` ends it at once")
        })?;
        outcome_of(end)
    }
}

impl Kill {
    pub(crate) fn run(self, _output: &Output) -> anyhow::Result<Outcome> {
        let vm = self.which.vm;
        ask(&vm, &Request::Kill { vm: vm.clone() }).map(|end| Outcome::done(ending(end)))
    }
}

impl Wait {
    pub(crate) fn run(self, _output: &Output) -> anyhow::Result<Outcome> {
        let vm = self.which.vm;
        let end = ask(&vm, &Request::Wait { vm: vm.clone() })?;
        eprintln!("forkvm: {vm} {}", text(&end, "end"));
        outcome_of(end)
    }
}

/// A command that ends with the status of the machine.
fn outcome_of(end: Value) -> anyhow::Result<Outcome> {
    let status = end["exit_code"]
        .as_u64()
        .and_then(|code| u8::try_from(code).ok());
    Ok(Outcome {
        status: status.context("the machine's answer lacks the exit code")?,
        report: ending(end),
    })
}

/// As `run` tells of it.
fn ending(mut answer: Value) -> Value {
    if let Value::Object(answer) = &mut answer {
        // It is the command's own.
        answer.remove("exit_code");
    }
    answer
}
