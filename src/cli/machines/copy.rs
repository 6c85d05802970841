//! `forkvm cp`: files into and out of a machine that another process runs.

use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use serde_json::json;
use tempfile::NamedTempFile;

use super::super::errors::Usage;
use super::super::output::{Outcome, Output};
use super::super::run::vm_name;
use super::exec::agent_of;

const EXAMPLES: &str = "\
Examples:
  forkvm cp input.fa web:/root/input.fa
  forkvm cp web.3:/root/result.txt .

One file, with its permissions (setuid and the like are left out), whole or not at all.
For directories: `tar c DIR | forkvm exec VM -- tar x`.";

/// Options of `cp`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Copy {
    /// FILE of the host, or VM:PATH with an absolute path
    from: String,
    /// Where to: VM:PATH, or a file or directory of the host
    to: String,
}

impl Copy {
    pub(crate) fn run(self, _output: &Output) -> anyhow::Result<Outcome> {
        let bytes = match (in_guest(&self.from)?, in_guest(&self.to)?) {
            (None, Some((vm, path))) => put(Path::new(&self.from), vm, path)?,
            (Some((vm, path)), None) => get(vm, path, Path::new(&self.to))?,
            _ => {
                let text = "one side is a file of the host, the other VM:PATH";
                return Err(Usage(text.into()).into());
            }
        };
        Ok(Outcome::done(
            json!({ "from": self.from, "to": self.to, "kib": bytes.div_ceil(1024) }),
        ))
    }
}

/// The machine and the path of `VM:PATH`; `None` for a file of the host, which may have a colon behind a slash.
fn in_guest(text: &str) -> anyhow::Result<Option<(&str, &Path)>> {
    let Some((vm, path)) = text.split_once(':').filter(|(vm, _)| !vm.contains('/')) else {
        return Ok(None);
    };
    vm_name(vm).map_err(Usage)?;
    if !path.starts_with('/') {
        return Err(Usage(format!("{path:?} of {vm} is no absolute path")).into());
    }
    Ok(Some((vm, Path::new(path))))
}

fn put(from: &Path, vm: &str, to: &Path) -> anyhow::Result<u64> {
    let what = || format!("reading {}", from.display());
    let mut file = File::open(from).with_context(what)?;
    let metadata = file.metadata().with_context(what)?;
    anyhow::ensure!(metadata.is_file(), "{} is no file", from.display());
    let mode = metadata.permissions().mode() & 0o777;
    agent_of(vm)?.put(to, mode, metadata.len(), &mut file)?;
    Ok(metadata.len())
}

fn get(vm: &str, from: &Path, to: &Path) -> anyhow::Result<u64> {
    let to = if to.is_dir() {
        to.join(from.file_name().context("the path names no file")?)
    } else {
        to.to_owned()
    };
    let what = || format!("writing {}", to.display());
    // A device, or a pipe: what is there is written to, not replaced.
    if to.metadata().is_ok_and(|there| !there.is_file()) {
        let mut there = File::options().write(true).open(&to).with_context(what)?;
        return Ok(agent_of(vm)?.get(from, &mut there)?.length);
    }
    let folder: PathBuf = match to.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.to_owned(),
        _ => ".".into(),
    };
    let mut file = NamedTempFile::new_in(folder).with_context(what)?;
    let got = agent_of(vm)?.get(from, &mut file)?;
    let mode = std::fs::Permissions::from_mode(got.mode & 0o777);
    file.as_file().set_permissions(mode).with_context(what)?;
    file.persist(&to).with_context(what)?;
    Ok(got.length)
}
