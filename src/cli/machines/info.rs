//! `forkvm info`: what one machine is, and does.

use std::io::Write;

use clap::Args;
use comfy_table::{Table, presets};
use serde_json::Value;

use super::super::output::{Outcome, Output};
use super::super::run::vm_name;
use super::{ago, info_of, text};

const EXAMPLES: &str = "\
Examples:
  forkvm info web
  forkvm info web.3 --json - | jq .memory.private_kib";

/// Options of `info`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Info {
    /// The machine, such as `web`, or a clone of it, such as `web.3`
    #[arg(value_parser = vm_name)]
    vm: String,
}

impl Info {
    pub(crate) fn run(self, output: &Output) -> anyhow::Result<Outcome> {
        let info = info_of(&self.vm)?;
        print(output, &info)?;
        Ok(Outcome::done(info))
    }
}

fn print(output: &Output, info: &Value) -> anyhow::Result<()> {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    let mut row = |what: &str, value: String| {
        table.add_row([what.to_owned(), value]);
    };
    row("name", text(info, "name").into());
    row(
        "state",
        format!(
            "{}, since {}",
            text(info, "state"),
            ago(&info["since_unix_ms"])
        ),
    );
    row("vcpus", info["vcpus"].to_string());
    row("memory", format!("{} MiB", info["memory_mib"]));
    row("process", info["pid"].to_string());
    row("depth", info["depth"].to_string());
    row("clone id", info["clone_id"].to_string());
    row("forks", info["fork_count"].to_string());
    row("generation", text(info, "generation").into());
    if let Some(path) = info["vsock"].as_str() {
        row("vsock", format!("{path}, CID {}", info["cid"]));
    }
    let memory = &info["memory"];
    let shared = format!(
        "{} KiB its own, {} KiB shared",
        memory["private_kib"], memory["shared_kib"]
    );
    row(
        "takes",
        format!("{shared}, {} KiB page tables", memory["page_tables_kib"]),
    );
    for disk in info["disks"].as_array().into_iter().flatten() {
        let read_only = disk["read_only"].as_bool().unwrap_or_default();
        let mode = if read_only { ", read-only" } else { "" };
        row(
            "disk",
            format!("{}, {} KiB{mode}", text(disk, "name"), disk["size_kib"]),
        );
    }
    row("reports", info["reports"]["count"].to_string());
    for (instruction, count) in info["fallback"].as_object().into_iter().flatten() {
        row("carried out", format!("{instruction}, {count} times"));
    }
    writeln!(output.text(), "{table}")?;
    Ok(())
}
