//! `forkvm template`: machines that were booted once, for clones to start from at any later time.
//!
//! What a template is and how it is kept is `forkvm::templates`'; here it is made, looked at, and forked
//! (`forkvm fork NAME -- PROGRAM`).

mod clones;
mod create;
mod each;

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use clap::{Args, Subcommand};
use comfy_table::{Table, presets};
use forkvm::engine::Family;
use forkvm::templates::{Template as Found, Templates};
use serde_json::{Value, json};

use super::machines::ago;
use super::output::{Outcome, Output};
use super::progress::Progress;
use super::run::vm_name;
use super::stop::Stop;

pub(crate) use clones::fork;
pub(crate) use each::{Place, run_in_each};

const SHOW: &str = "\
Example:
  forkvm template show web --json - | jq -r '.files[].path'";

const VERIFY: &str = "\
Example:
  forkvm template verify web

Reads all files that the template is made of and holds them against their hashes. A fork only looks at their
sizes, times and inodes.";

const RM: &str = "\
Example:
  forkvm template rm web

Kernel and disks that it was made of stay. Clones that run have all that they need.";

/// Subcommands of `template`.
#[derive(Debug, Subcommand)]
pub(crate) enum Template {
    /// Boot a machine, wait for its agent, and save it under a name
    Create(Box<create::Create>),
    /// List the templates
    Ls,
    /// Tell more of one
    #[command(after_help = SHOW)]
    Show(Which),
    /// Read all of it, and say whether it is as it was made
    #[command(after_help = VERIFY)]
    Verify(Which),
    /// Remove one
    #[command(after_help = RM)]
    Rm(Which),
}

/// Which template.
#[derive(Debug, Args)]
pub(crate) struct Which {
    /// Its name
    #[arg(value_parser = vm_name)]
    name: String,
}

impl Template {
    pub(crate) fn run(self, output: &Output) -> anyhow::Result<Outcome> {
        match self {
            Template::Create(command) => command.run(output),
            Template::Ls => list(output),
            Template::Show(Which { name }) => show(&name, output),
            Template::Verify(Which { name }) => verify(&name, output),
            Template::Rm(Which { name }) => {
                Templates::of_user()?.remove(&name)?;
                Ok(Outcome::done(json!({ "name": name })))
            }
        }
    }
}

fn list(output: &Output) -> anyhow::Result<Outcome> {
    let templates = Templates::of_user()?;
    let mut found = Vec::new();
    for name in templates.names()? {
        match templates.find(&name) {
            Ok(template) => found.push(template),
            Err(error) => super::errors::warn(&error.into()),
        }
    }
    let mut text = output.text();
    if found.is_empty() {
        writeln!(text, "no templates in {}", templates.directory().display())?;
    } else {
        let mut table = Table::new();
        table
            .load_preset(presets::NOTHING)
            .set_header(["template", "vcpus", "memory", "size", "made"]);
        for template in &found {
            let about = &template.manifest().about;
            table.add_row([
                template.name().to_owned(),
                about["vcpus"].to_string(),
                format!("{} MiB", about["memory_mib"]),
                format!("{} MiB", template.manifest().bytes() >> 20),
                made(template),
            ]);
        }
        writeln!(text, "{table}")?;
    }
    let found: Vec<Value> = found.iter().map(to_json).collect();
    Ok(Outcome::done(
        json!({ "directory": templates.directory(), "templates": found }),
    ))
}

fn show(name: &str, output: &Output) -> anyhow::Result<Outcome> {
    let template = Templates::of_user()?.find(name)?;
    let manifest = template.manifest();
    let mut text = output.text();
    writeln!(text, "template   {name}, made {}", made(&template))?;
    writeln!(text, "directory  {}", template.directory().display())?;
    if let Value::Object(about) = &manifest.about {
        for (what, value) in about {
            writeln!(text, "{what:<10} {value}")?;
        }
    }
    for file in &manifest.files {
        let (kib, path) = (file.file.len.div_ceil(1024), file.file.path.display());
        writeln!(text, "{kib:>10} KiB  {path}")?;
    }
    Ok(Outcome::done(to_json(&template)))
}

fn verify(name: &str, output: &Output) -> anyhow::Result<Outcome> {
    let template = Templates::of_user()?.find(name)?;
    let mut bar = Progress::new("reading");
    let verified = template.verify(&mut |done, total| bar.update(done, total));
    drop(bar);
    verified?;
    let files = template.manifest().files.len();
    writeln!(
        output.text(),
        "all {files} files of {name} are as they were"
    )?;
    Ok(Outcome::done(
        json!({ "name": name, "files": files, "kib": template.manifest().bytes().div_ceil(1024) }),
    ))
}

fn made(template: &Found) -> String {
    format!("{} ago", ago(&template.manifest().created_unix_ms.into()))
}

fn to_json(template: &Found) -> Value {
    let manifest = template.manifest();
    let file = |file: &forkvm::templates::HashedFile| json!({ "path": file.file.path, "kib": file.file.len.div_ceil(1024), "blake3": file.blake3 });
    let files: Vec<Value> = manifest.files.iter().map(file).collect();
    json!({
        "name": template.name(),
        "directory": template.directory(),
        "created_unix_ms": manifest.created_unix_ms,
        "about": manifest.about,
        "files": files,
    })
}

/// Ends the family when the user wants the command to end, so that it comes to its own end.
pub(super) fn end_when_asked(stop: &Stop, family: &Arc<Family>) -> io::Result<()> {
    let (asked, family) = (stop.asked(), Arc::downgrade(family));
    let watch = move || {
        while let Some(family) = family.upgrade() {
            if asked.load(Ordering::Acquire) {
                return family.end();
            }
            drop(family);
            thread::sleep(Duration::from_millis(50));
        }
    };
    thread::Builder::new().name("stop".into()).spawn(watch)?;
    Ok(())
}
