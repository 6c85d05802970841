//! `forkvm state`: looks at saved machines without starting them.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Subcommand;
use comfy_table::{Table, presets};
use forkvm::devices::Sections;
use forkvm::engine::saved::{disk::SavedDisk, disk_section};
use forkvm::vmm::MachineSummary;
use forkvm::vmm::memory_file::{MemoryFile, PAGE};
use forkvm::vmm::state_file::{self, FORMAT, StateFile};
use serde_json::{Value, json};

use super::output::{Outcome, Output};
use super::progress::Progress;

/// Subcommands of `state`.
#[derive(Debug, Subcommand)]
pub(crate) enum State {
    /// Show what is in a state file, or in the directory of a saved machine, whose memory is then
    /// checked as well; name what is wrong with a damaged one
    Show {
        /// A state file, or the directory of a saved machine
        #[arg(value_name = "FILE|DIR")]
        path: PathBuf,
    },
}

impl State {
    pub(crate) fn run(self, output: &Output) -> anyhow::Result<Outcome> {
        let State::Show { path } = self;
        let whole = path.is_dir();
        let file = if whole {
            path.join("state")
        } else {
            path.clone()
        };
        let state = read(&file).with_context(|| format!("reading {}", file.display()))?;
        let sections = sections_json(&state.sections);
        // Sections that are whole but no machine's are shown all the same.
        let machine = match MachineSummary::of(&state.sections) {
            Ok(summary) => machine_json(&summary, &state.sections)?,
            Err(error) => json!({ "error": error.to_string() }),
        };
        let save = state.save.map(|save| save.to_string());
        print(&mut output.text(), &file, &state, &sections, &machine)?;
        let memory = if whole {
            check_memory(&path.join("memory"), &state, &machine)?
        } else {
            Value::Null
        };
        if let Value::Object(memory) = &memory {
            let (mib, data) = (&memory["memory_mib"], &memory["data_mib"]);
            writeln!(
                output.text(),
                "memory       {mib} MiB, {data:.1} of them data; all checksums fit"
            )?;
        }
        Ok(Outcome::done(json!({
            "path": file,
            "format": FORMAT,
            "save": save,
            "sections": sections,
            "machine": machine,
            "memory": memory,
        })))
    }
}

fn read(path: &Path) -> anyhow::Result<StateFile> {
    Ok(state_file::read(File::open(path)?)?)
}

fn sections_json(sections: &Sections) -> Vec<Value> {
    let section = |section: &forkvm::devices::Section| json!({ "kind": section.kind, "version": section.version, "bytes": section.body.len() });
    sections.iter().map(section).collect()
}

fn machine_json(summary: &MachineSummary, sections: &Sections) -> anyhow::Result<Value> {
    let vcpus = summary
        .vcpus
        .iter()
        .map(|vcpu| json!({ "rip": format!("{:#x}", vcpu.rip), "activity": vcpu.activity }));
    let regions = summary.regions.iter().map(
        |region| json!({ "start": format!("{:#x}", region.start), "size_mib": region.len >> 20 }),
    );
    let mut disks = Vec::new();
    for disk in &summary.config.disks {
        let mut shown = json!({
            "name": disk.name, "size_kib": disk.len / 1024, "read_only": disk.read_only,
        });
        if let Some(section) = sections.find(&disk_section(&disk.name)) {
            let saved: SavedDisk = section.decode()?;
            let overlays: Vec<_> = saved
                .overlays
                .iter()
                .map(|overlay| &overlay.data.path)
                .collect();
            shown["kind"] = saved.kind.as_str().into();
            shown["base"] = json!(saved.base.path);
            shown["overlays"] = json!(overlays);
            shown["saved_sectors"] = saved.sectors.into();
        }
        disks.push(shown);
    }
    Ok(json!({
        "saved_on": summary.host,
        "memory_mib": summary.config.memory_mib,
        "vcpus": vcpus.collect::<Vec<_>>(),
        "regions": regions.collect::<Vec<_>>(),
        "disks": disks,
    }))
}

/// Looks at the memory file and at every checksum in it.
fn check_memory(path: &Path, state: &StateFile, machine: &Value) -> anyhow::Result<Value> {
    let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    let memory = MemoryFile::open(file, path.display().to_string())?;
    if let Some(save) = state.save {
        memory.check_save(save)?;
    }
    if let Some(mib) = machine["memory_mib"].as_u64() {
        memory.check_len(mib << 20)?;
    }
    let mut bar = Progress::new("checking memory");
    memory.verify(&mut |progress| bar.update(progress.done, progress.total))?;
    let pages: u64 = (0..memory.chunks())
        .map(|chunk| {
            memory
                .data_pages(chunk)
                .map_or(0, |pages| u64::from(pages.count_ones()))
        })
        .sum();
    Ok(json!({
        "memory_mib": memory.memory_len() >> 20,
        "data_mib": (pages * PAGE as u64) as f64 / f64::from(1 << 20),
    }))
}

fn print(
    out: &mut dyn Write,
    path: &Path,
    state: &StateFile,
    sections: &[Value],
    machine: &Value,
) -> anyhow::Result<()> {
    writeln!(out, "state file   {}, format {FORMAT}", path.display())?;
    match &state.save {
        Some(save) => writeln!(out, "save         {save}")?,
        None => writeln!(out, "save         none: a state without memory")?,
    }
    let mut table = Table::new();
    table
        .load_preset(presets::NOTHING)
        .set_header(["section", "version", "bytes"]);
    for section in sections {
        let cell = |key: &str| match &section[key] {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        table.add_row([cell("kind"), cell("version"), cell("bytes")]);
    }
    writeln!(out, "{table}")?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    if let Some(error) = machine["error"].as_str() {
        writeln!(out, "not a whole machine: {error}")?;
        return Ok(());
    }
    writeln!(out, "saved on     {}", text(&machine["saved_on"]))?;
    let list = |key: &str| machine[key].as_array().cloned().unwrap_or_default();
    for (index, vcpu) in list("vcpus").iter().enumerate() {
        let (rip, activity) = (text(&vcpu["rip"]), text(&vcpu["activity"]));
        writeln!(out, "vCPU {index:<8}RIP {rip}, {activity}")?;
    }
    for region in list("regions") {
        writeln!(
            out,
            "RAM          {} MiB at {}",
            region["size_mib"],
            text(&region["start"])
        )?;
    }
    for disk in list("disks") {
        let (name, kind, base) = (
            text(&disk["name"]),
            text(&disk["kind"]),
            text(&disk["base"]),
        );
        write!(
            out,
            "disk {name:<8}{} KiB, {kind}, on {base}",
            disk["size_kib"]
        )?;
        let overlays = disk["overlays"].as_array().cloned().unwrap_or_default();
        overlays
            .iter()
            .try_for_each(|overlay| write!(out, " + {}", text(overlay)))?;
        if disk["saved_sectors"] == Value::Bool(true) {
            write!(out, " + saved sectors")?;
        }
        writeln!(out)?;
    }
    Ok(())
}
