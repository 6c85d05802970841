//! One program in many machines: outputs line by line behind the machine's name, and the worst of their statuses.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::Context;
use forkvm::agent::protocol::Exec;
use forkvm::agent::{AgentClient, AgentError};
use serde_json::{Value, json};

use crate::cli::errors;
use crate::cli::output::Output;

/// What a program is told of the clone that it runs in.
const CLONE_ID: &str = "FORKVM_CLONE_ID";

/// Ended where the program could not be run, or its machine went.
const FAILED: u8 = 255;

/// A machine and its agent.
pub(crate) struct Place {
    pub(crate) vm: String,
    /// 1 to n.
    pub(crate) clone_id: u32,
    pub(crate) agent: AgentClient,
}

/// With what a program ended in each place.
pub(crate) struct Ran(Vec<(String, u8)>);

impl Ran {
    /// The status that a command ends with.
    pub(crate) fn worst(&self) -> u8 {
        let statuses = self.0.iter().map(|(_, status)| *status);
        statuses.max().unwrap_or_default()
    }

    pub(crate) fn to_json(&self) -> Value {
        let ended = self.0.iter();
        ended
            .map(|(name, status)| json!({ "name": name, "status": status }))
            .collect()
    }
}

/// Runs `program` in all of them at once, and waits for its end in each.
pub(crate) fn run_in_each(
    places: &[Place],
    program: &[String],
    output: &Output,
) -> anyhow::Result<Ran> {
    let out = Arc::new(Mutex::new(output.text()));
    let err: Arc<Mutex<Box<dyn Write + Send>>> = Arc::new(Mutex::new(Box::new(io::stderr())));
    thread::scope(|scope| {
        let start = |place| {
            let (mut out, mut err) = (Lines::of(place, &out), Lines::of(place, &err));
            let run = move || run(place, program, &mut out, &mut err);
            thread::Builder::new()
                .name("program".into())
                .spawn_scoped(scope, run)
        };
        let threads: Vec<io::Result<_>> = places.iter().map(start).collect();
        let join = |thread: thread::ScopedJoinHandle<'_, u8>| match thread.join() {
            Ok(status) => status,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        let statuses = threads.into_iter().map(|thread| thread.map(join));
        // All of them are waited for, whatever came of the first.
        let statuses: Vec<io::Result<u8>> = statuses.collect();
        let statuses: io::Result<Vec<u8>> = statuses.into_iter().collect();
        let statuses = statuses.context("starting a thread")?;
        let names = places.iter().map(|place| place.vm.clone());
        Ok(Ran(names.zip(statuses).collect()))
    })
}

fn run(place: &Place, program: &[String], out: &mut Lines, err: &mut Lines) -> u8 {
    let exec = Exec {
        argv: program.iter().map(|word| word.as_str().into()).collect(),
        env: vec![(CLONE_ID.into(), place.clone_id.to_string().as_str().into())],
        ..Exec::default()
    };
    let ran = place
        .agent
        .exec(&exec)
        .and_then(|running| running.pump(None, out, err));
    let status = ran.map_or_else(|error| tell(place, error), |exit| exit.status());
    if status != 0 {
        eprintln!("forkvm: the program ended with {status} in {}", place.vm);
    }
    status
}

fn tell(place: &Place, error: AgentError) -> u8 {
    errors::warn(&anyhow::Error::from(error).context(format!("running it in {}", place.vm)));
    FAILED
}

/// Whole lines of one machine, each behind its name, to where others write as well.
struct Lines {
    name: String,
    line: Vec<u8>,
    to: Arc<Mutex<Box<dyn Write + Send>>>,
}

impl Lines {
    fn of(place: &Place, to: &Arc<Mutex<Box<dyn Write + Send>>>) -> Lines {
        Lines {
            name: place.vm.clone(),
            line: Vec::new(),
            to: to.clone(),
        }
    }

    fn write_line(&mut self) -> io::Result<()> {
        let mut to = self.to.lock().unwrap_or_else(PoisonError::into_inner);
        write!(to, "{}: ", self.name)?;
        to.write_all(&self.line)?;
        to.write_all(b"\n")?;
        self.line.clear();
        to.flush()
    }
}

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for &byte in bytes {
            match byte {
                b'\n' => self.write_line()?,
                byte => self.line.push(byte),
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Lines {
    /// A last line that has no end is one all the same.
    fn drop(&mut self) {
        if !self.line.is_empty()
            && let Err(error) = self.write_line()
        {
            tracing::debug!(%error, vm = self.name, "its last line goes nowhere");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Default)]
    struct Shown(Arc<Mutex<Vec<u8>>>);

    impl Write for Shown {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lines_of_machines_are_whole_and_named_however_they_arrive() {
        let shown = Shown::default();
        let to: Arc<Mutex<Box<dyn Write + Send>>> = Arc::new(Mutex::new(Box::new(shown.clone())));
        let lines = |vm: &str| Lines {
            name: vm.into(),
            line: Vec::new(),
            to: to.clone(),
        };
        let (mut one, mut other) = (lines("web.1"), lines("web.2"));
        one.write_all(b"a ").unwrap();
        other.write_all(b"x\ny").unwrap();
        one.write_all(b"b\n\n").unwrap();
        drop(other);
        drop(one);
        let text = String::from_utf8(shown.0.lock().unwrap().clone()).unwrap();
        assert_eq!(text, "web.2: x\nweb.1: a b\nweb.1: \nweb.2: y\n");
    }
}
