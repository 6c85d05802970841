//! What a Linux guest's program takes longer than the same program on the host.
//!
//! The guest's own busybox counts in a loop of its shell, in a clone and, fetched from there, on the host. It computes and asks
//! the kernel for nothing, so what it takes longer is what the guest's kernel does by itself: timer interrupts, which are counted, and
//! what else is due.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use forkvm_agent_protocol::{Exec, Exit};
use forkvm_clone_engine::{ForkPoint, MemoryMode};
use tempfile::TempDir;

use crate::agent::AgentClient;
use crate::bench::linux::LinuxSubject;
use crate::bench::measure::{BenchError, Experiment, Repetitions, Samples, Unit, call};
use crate::bench::setting::Setting;

/// Where the guest has its busybox.
const PROGRAM: &str = "/bin/busybox";

/// Says the time, and how many timer interrupts its first CPU has had, before and after so many steps of a loop. No other
/// program is started.
const SCRIPT: &str = r#"
look() {
    read -r now rest </proc/uptime
    while read -r name count rest; do
        if [ "$name" = LOC: ]; then ticks=$count; fi
    done </proc/interrupts
}
look
began=$now before=$ticks i=0
while [ $i -lt 1000000 ]; do i=$((i+1)); done
look
echo $began $now $before $ticks
"#;

/// What the script has said.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Loop {
    seconds: f64,
    ticks: f64,
}

impl Loop {
    fn parse(said: &[u8]) -> io::Result<Loop> {
        let said = String::from_utf8_lossy(said);
        let numbers: Result<Vec<f64>, _> = said.split_whitespace().map(str::parse).collect();
        match numbers.as_deref() {
            Ok([began, ended, before, after]) => Ok(Loop {
                seconds: ended - began,
                ticks: after - before,
            }),
            _ => Err(io::Error::other(format!("it said {said:?}"))),
        }
    }
}

/// See the module's text.
#[derive(Default)]
pub(super) struct CpuBound {
    // Before the subject: its family ends with that.
    point: Option<Arc<ForkPoint>>,
    subject: Option<LinuxSubject>,
    program: Option<TempDir>,
}

impl Experiment for CpuBound {
    fn name(&self) -> String {
        "linux/cpu-bound".into()
    }

    fn repetitions(&self) -> Repetitions {
        Repetitions {
            warm_up: 0,
            measured: 3,
        }
    }

    fn prepare(&mut self) -> Result<(), BenchError> {
        let subject = LinuxSubject::restore(Setting::PLAIN)?;
        self.program = Some(fetch(subject.agent())?);
        self.point = Some(subject.point(MemoryMode::Cow)?);
        self.subject = Some(subject);
        Ok(())
    }

    fn repeat(&mut self, samples: &mut Samples) -> Result<(), BenchError> {
        let (Some(subject), Some(point), Some(program)) =
            (&self.subject, &self.point, &self.program)
        else {
            return Ok(());
        };
        let host = on_host(program.path()).map_err(call("a loop of busybox on the host"))?;
        let clone = subject.spawn_one(point)?;
        let guest = in_guest(clone.vm.agent())?;
        let more = guest.seconds - host.seconds;
        samples
            .value(
                &format!("{}/percent", self.name()),
                Unit::Percent,
                100.0 * more / host.seconds,
            )
            .column("host_ms", host.seconds * 1e3)
            .column("guest_ms", guest.seconds * 1e3)
            .column("ticks", guest.ticks);
        // Of a loop that had none, or took no longer, nothing can be said.
        if guest.ticks > 0.0 && more > 0.0 {
            samples.value(
                &format!("{}/tick", self.name()),
                Unit::Us,
                1e6 * more / guest.ticks,
            );
        }
        Ok(())
    }
}

/// The guest's busybox, in a directory of the host's.
fn fetch(agent: &AgentClient) -> Result<TempDir, BenchError> {
    let failed = || call("copying the guest's busybox");
    let directory = tempfile::tempdir().map_err(failed())?;
    let path = directory.path().join("busybox");
    agent.get(
        Path::new(PROGRAM),
        &mut File::create(&path).map_err(failed())?,
    )?;
    fs::set_permissions(&path, Permissions::from_mode(0o755)).map_err(failed())?;
    Ok(directory)
}

fn on_host(directory: &Path) -> io::Result<Loop> {
    let mut command = Command::new(directory.join("busybox"));
    let output = command.args(["sh", "-c", SCRIPT]).output()?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(io::Error::other(said.trim().to_owned()));
    }
    Loop::parse(&output.stdout)
}

fn in_guest(agent: &AgentClient) -> Result<Loop, BenchError> {
    let failed = || call("a loop of busybox in the guest");
    let exec = Exec {
        argv: [PROGRAM, "sh", "-c", SCRIPT].map(Into::into).to_vec(),
        ..Exec::default()
    };
    let (mut said, mut errors) = (Vec::new(), Vec::new());
    match agent.exec(&exec)?.pump(None, &mut said, &mut errors)? {
        Exit::Code(0) => Loop::parse(&said).map_err(failed()),
        exit => {
            let said = String::from_utf8_lossy(&errors);
            let text = format!("it ended with status {}: {}", exit.status(), said.trim());
            Err(failed()(io::Error::other(text)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loop_is_what_lies_between_two_looks() {
        let due = Loop {
            seconds: 1.5,
            ticks: 12.0,
        };
        assert_eq!(Loop::parse(b"10.25 11.75 100 112\n").unwrap(), due);
        let error = Loop::parse(b"sh: no\n").unwrap_err().to_string();
        assert!(error.contains("sh: no"), "{error}");
    }
}
