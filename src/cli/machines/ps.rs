//! `forkvm ps`: which machines run.

use std::io::Write;

use clap::Args;
use comfy_table::{Table, presets};
use serde_json::{Value, json};

use super::super::control::client::{Connection, Reached};
use super::super::control::place::Places;
use super::super::control::protocol::Request;
use super::super::output::{Outcome, Output};
use super::super::run::vm_name;
use super::{ago, text};

const EXAMPLES: &str = "\
Examples:
  forkvm ps                             all machines of this user, and their clones
  forkvm ps web                         those of one family
  forkvm ps --json - | jq -r '.vms[].name'

Machines are found that were started with --name. A machine that holds its name and does not answer
is told of on standard error.";

/// Options of `ps`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Ps {
    /// Only the family that was started with this name
    #[arg(value_parser = vm_name)]
    name: Option<String>,
}

impl Ps {
    pub(crate) fn run(self, output: &Output) -> anyhow::Result<Outcome> {
        let places = Places::of_user()?;
        let mut vms = Vec::new();
        let mut unreachable = Vec::new();
        if let Some(name) = &self.name {
            let answer = Connection::to(name)?.look_up(&Request::Ps {})?;
            vms.extend(list(answer));
        } else {
            for name in places.names()? {
                match ask(&places, &name) {
                    Ok(found) => vms.extend(found),
                    Err(error) => {
                        let why = format!("{error:#}");
                        eprintln!("forkvm: {name} does not answer: {why}");
                        unreachable.push(json!({ "name": name, "why": why }));
                    }
                }
            }
        }
        print(output, &places, &vms)?;
        Ok(Outcome::done(
            json!({ "vms": vms, "unreachable": unreachable }),
        ))
    }
}

/// The VMs of the machine `name`; none when it has ended.
fn ask(places: &Places, name: &str) -> anyhow::Result<Vec<Value>> {
    match Connection::to_machine(places, name)? {
        Reached::Connected(mut connection) => Ok(list(connection.look_up(&Request::Ps {})?)),
        Reached::Silent { process } => {
            anyhow::bail!("process {process} is just starting or ending it")
        }
        Reached::Nobody => Ok(Vec::new()),
    }
}

fn list(mut answer: Value) -> Vec<Value> {
    match answer["vms"].take() {
        Value::Array(vms) => vms,
        _ => Vec::new(),
    }
}

fn print(output: &Output, places: &Places, vms: &[Value]) -> anyhow::Result<()> {
    let mut out = output.text();
    if vms.is_empty() {
        writeln!(out, "no machines in {}", places.dir().display())?;
        return Ok(());
    }
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header([
        "name", "state", "vcpus", "memory", "depth", "process", "cid", "since",
    ]);
    for vm in vms {
        table.add_row([
            text(vm, "name").to_owned(),
            text(vm, "state").to_owned(),
            vm["vcpus"].to_string(),
            format!("{} MiB", vm["memory_mib"]),
            vm["depth"].to_string(),
            vm["pid"].to_string(),
            vm["cid"]
                .as_u64()
                .map(|cid| cid.to_string())
                .unwrap_or_default(),
            ago(&vm["since_unix_ms"]),
        ]);
    }
    writeln!(out, "{table}")?;
    Ok(())
}
