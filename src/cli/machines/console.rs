//! `forkvm console`: the console of a machine that another process runs.
//!
//! One thread shows what the VM prints, another passes on what is typed. Where standard input is a terminal it
//! is raw, so that each key goes to the guest as it is pressed; Ctrl-] leaves the machine alone again.

use std::io::{self, IsTerminal, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use clap::Args;
use serde_json::json;
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};

use super::super::console::is_live;
use super::super::control::client::{Connection, Typist};
use super::super::control::protocol::{Bytes, CONSOLE_CHUNK, Ending, Request, Shown};
use super::super::output::{Outcome, Output};
use super::super::raw_terminal::{ESCAPE, Lines, RawTerminal};
use super::super::run::vm_name;

const EXAMPLES: &str = "\
Examples:
  forkvm console web                   Ctrl-] leaves it, and the machine runs on
  forkvm console web.3 > log           what a clone prints from now on, until it ends
  echo 'w 0 7 1' | forkvm console web  types a line, and goes on showing

On a terminal all keys but Ctrl-] go to the guest, Ctrl-C too. What was printed before is not shown.";

/// Options of `console`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Console {
    /// The machine, such as `web`, or a clone of it, such as `web.3`
    #[arg(value_parser = vm_name)]
    vm: String,
}

impl Console {
    pub(crate) fn run(self, output: &Output) -> anyhow::Result<Outcome> {
        let mut connection = Connection::to(&self.vm)?;
        connection.ask(&Request::Console {
            vm: self.vm.clone(),
        })?;
        let raw = io::stdin().is_terminal().then(|| {
            eprintln!("forkvm: the console of {}; Ctrl-] leaves it", self.vm);
            RawTerminal::begin(&[SIGHUP, SIGINT, SIGQUIT, SIGTERM], Lines::Processed)
        });
        let raw = raw.transpose()?;
        let left = Arc::new(AtomicBool::new(false));
        if is_live(&io::stdin()) {
            let (typist, left) = (connection.typist()?, left.clone());
            let escapes = raw.is_some();
            let pass = move || pass_input(typist, escapes, &left);
            thread::Builder::new().name("stdin".into()).spawn(pass)?;
        }
        let shown = show(&mut connection, output);
        drop(raw);
        let ending = match shown {
            Err(_) | Ok(None) if left.load(Ordering::Acquire) => None,
            Ok(None) => anyhow::bail!("the process of {} has gone, and {0} with it", self.vm),
            shown => shown?,
        };
        if let Some(ending) = &ending {
            eprintln!("forkvm: {} {}", self.vm, ending.end);
        }
        let end = ending.as_ref().map(|ending| &ending.end);
        let status = ending.as_ref().map(|ending| ending.status);
        Ok(Outcome::done(
            json!({ "vm": self.vm, "end": end, "status": status }),
        ))
    }
}

/// Shows what is printed; how the VM ended, or `None` when the connection did.
fn show(connection: &mut Connection, output: &Output) -> anyhow::Result<Option<Ending>> {
    let mut out = output.text();
    while let Some(shown) = connection.next_shown()? {
        match shown {
            Shown::Printed(Bytes(bytes)) => {
                out.write_all(&bytes)?;
                out.flush()?;
            }
            Shown::Lost(bytes) => eprintln!("forkvm: {bytes} bytes are missing here"),
            Shown::Ended(ending) => return Ok(Some(ending)),
            Shown::Error(failure) => return Err(failure.into()),
        }
    }
    Ok(None)
}

/// Passes standard input on until it ends, or the key that leaves comes.
fn pass_input(mut typist: Typist, escapes: bool, left: &AtomicBool) {
    let mut buffer = [0; CONSOLE_CHUNK];
    let passed = loop {
        let typed = match io::stdin().read(&mut buffer) {
            Ok(0) => return,
            Ok(len) => &buffer[..len],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => break Err(error),
        };
        let escape = typed.iter().position(|byte| escapes && *byte == ESCAPE);
        let keys = &typed[..escape.unwrap_or(typed.len())];
        let passed = if keys.is_empty() {
            Ok(())
        } else {
            typist.type_in(keys)
        };
        if escape.is_some() {
            left.store(true, Ordering::Release);
            break passed.and_then(|()| typist.hang_up());
        }
        if passed.is_err() {
            break passed;
        }
    };
    if let Err(error) = passed {
        tracing::debug!(%error, "what is typed goes nowhere any more");
    }
}
