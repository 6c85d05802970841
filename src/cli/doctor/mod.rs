//! `forkvm doctor`: whether this host has what forkvm needs, and how to mend what it lacks.

mod boot;
mod limits;
mod userfault;

use std::io::Write;
use std::sync::Arc;

use clap::Args;
use comfy_table::{ContentArrangement, Table, presets};
use forkvm::vmm::{Kvm, KvmError, memory};
use serde::Serialize;
use serde_json::json;

use super::output::{Outcome, Output};
use forkvm::host::Host;

const EXAMPLES: &str = "\
Examples:
  forkvm doctor
  forkvm doctor --json - | jq '.checks[] | select(.ok | not)'

Ends with 3 when something is missing without which no VM can run or fork.";

/// Options of `doctor`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Doctor {}

/// One look at the host.
#[derive(Debug, Serialize)]
struct Check {
    name: &'static str,
    ok: bool,
    needed_for: &'static str,
    detail: String,
    /// What to do; empty when all is well.
    mend: String,
    /// Without it nothing works.
    #[serde(skip)]
    required: bool,
}

impl Check {
    /// Passes with `Ok(detail)`; fails with what is wrong and what to do.
    fn new(
        name: &'static str,
        required: bool,
        needed_for: &'static str,
        found: Result<String, Lack>,
    ) -> Check {
        let (ok, detail, mend) = match found {
            Ok(detail) => (true, detail, String::new()),
            Err(Lack { detail, mend }) => (false, detail, mend),
        };
        Check {
            name,
            ok,
            needed_for,
            detail,
            mend,
            required,
        }
    }
}

/// Something is not as it should be.
struct Lack {
    detail: String,
    mend: String,
}

impl Lack {
    fn new(detail: impl ToString, mend: impl ToString) -> Lack {
        Lack {
            detail: detail.to_string(),
            mend: mend.to_string(),
        }
    }
}

impl Doctor {
    pub(crate) fn run(self, output: &Output) -> anyhow::Result<Outcome> {
        let checks = [
            Check::new("kvm", true, "every VM", kvm()),
            Check::new("boot", true, "every VM", boot::hello()),
            Check::new("memfd", true, "guest memory and forks of it", memfd()),
            limits::kernel(),
            limits::open_files(),
            limits::mappings(),
            limits::memory(),
            userfault::check(),
            Check::new("rewind", false, "rewinding clones in place", rewind()),
        ];
        print(&mut output.text(), &checks)?;
        let lacks = checks.iter().any(|check| check.required && !check.ok);
        let report = json!({ "host": Host::here(), "checks": checks });
        Ok(Outcome {
            status: if lacks { 3 } else { 0 },
            report,
        })
    }
}

fn kvm() -> Result<String, Lack> {
    match Kvm::open() {
        Ok(kvm) => Ok(format!("/dev/kvm, flavour {}", kvm.flavour())),
        Err(error @ (KvmError::Absent | KvmError::Denied)) => {
            let text = error.to_string();
            let (detail, mend) = text.split_once(": ").unwrap_or((&text, ""));
            Err(Lack::new(detail, mend))
        }
        Err(error) => {
            let detail = format!("{:#}", anyhow::Error::from(error));
            Err(Lack::new(
                detail,
                "use a host kernel with KVM of Linux 6.1 or newer",
            ))
        }
    }
}

/// How a clone goes back to its fork point here; none of the ways is a lack.
fn rewind() -> Result<String, Lack> {
    let asked = Kvm::open()
        .map_err(anyhow::Error::from)
        .and_then(|kvm| Ok(Arc::new(kvm).sees_rewritten_tables()?));
    match asked {
        Ok(true) => Ok("in place: a guest goes by its page tables as they are in memory".into()),
        Ok(false) => Ok("by a fresh shell: this KVM shadows page tables".into()),
        Err(error) => Err(Lack::new(
            format!("{error:#}"),
            "look for a KVM problem in the host's kernel log (`dmesg`)",
        )),
    }
}

/// A memfd with the seals that images carry.
fn memfd() -> Result<String, Lack> {
    let sealed = memory::memfd(c"forkvm-doctor", memory::PAGE)
        .and_then(|file| memory::seal(&file, libc::F_SEAL_FUTURE_WRITE | libc::F_SEAL_WRITE));
    match sealed {
        Ok(()) => Ok("memfd_create with seals".into()),
        Err(error) => {
            let detail = format!("{:#}", anyhow::Error::from(error));
            Err(Lack::new(
                detail,
                "use Linux 5.1 or newer, and allow memfd_create in the sandbox",
            ))
        }
    }
}

fn print(out: &mut dyn Write, checks: &[Check]) -> anyhow::Result<()> {
    let mut table = Table::new();
    table
        .load_preset(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header(["check", "", "found", "needed for"]);
    for check in checks {
        let verdict = match (check.ok, check.required) {
            (true, _) => "ok",
            (false, true) => "MISSING",
            (false, false) => "lacking",
        };
        table.add_row([check.name, verdict, &check.detail, check.needed_for]);
    }
    writeln!(out, "{table}")?;
    for check in checks.iter().filter(|check| !check.ok) {
        writeln!(out, "to mend {}: {}", check.name, check.mend)?;
    }
    Ok(())
}
