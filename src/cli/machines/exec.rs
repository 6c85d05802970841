//! `forkvm exec`: a program in a machine that another process runs, as if it ran here.
//!
//! The machine's agent runs it; its streams, its terminal, the signals that this command gets and its status
//! pass between the two. Nothing of the protocol is here: that is `forkvm::agent`.

use std::env;
use std::ffi::OsString;
use std::io::{self, IsTerminal, Read};
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use forkvm::agent::protocol::{Bytes, Exec as Program, Healthy, Size};
use forkvm::agent::{AgentClient, Control, REQUEST_LIMIT};
use rustix::termios::tcgetwinsize;
use serde_json::json;
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGWINCH};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;

use super::super::errors::Usage;
use super::super::output::{Outcome, Output};
use super::super::raw_terminal::{self, ESCAPE, LineFeeds, RawTerminal};
use super::super::run::vm_name;
use super::{info_of, text};

const EXAMPLES: &str = "\
Examples:
  forkvm exec web -- uname -a
  forkvm exec -t web.3 -- sh           a shell on a terminal
  tar c src | forkvm exec web --dir /srv -- tar x
  forkvm exec web --user nobody --env LANG=C -- sort < input > output

Ends with the status of the program, 128+n when signal n ended it. Ctrl-C, SIGTERM, SIGHUP and SIGQUIT go to
the program; when this command is gone it is hung up on. Where the program does not hear, a second SIGTERM
or SIGHUP ends this command, and with -t so does Ctrl-]. The machine needs a vsock and forkvm's agent.";

/// Options of `exec`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Exec {
    /// Give the program a terminal
    #[arg(short = 't', long)]
    terminal: bool,
    /// Run it as this user of the guest, by name or number [default: root]
    #[arg(long)]
    user: Option<String>,
    /// Its working directory
    #[arg(long, value_name = "DIR")]
    dir: Option<String>,
    /// A variable of its environment; may be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = variable)]
    env: Vec<(String, String)>,
    /// The machine, such as `web`, or a clone of it, such as `web.3`
    #[arg(value_parser = vm_name)]
    vm: String,
    /// The program and its arguments
    #[arg(required = true, last = true)]
    program: Vec<String>,
}

impl Exec {
    pub(crate) fn run(self, output: &Output) -> anyhow::Result<Outcome> {
        if self.terminal && !io::stdin().is_terminal() {
            return Err(Usage("-t needs a terminal as standard input".into()).into());
        }
        let agent = agent_of(&self.vm)?;
        let program = Program {
            argv: self
                .program
                .iter()
                .map(|word| word.as_str().into())
                .collect(),
            env: environment(env::var_os("TERM").filter(|_| self.terminal), self.env),
            directory: self.dir.map(bytes),
            user: self.user,
            terminal: self.terminal.then(size).transpose()?,
        };
        let running = agent.exec(&program)?;
        // The guest's terminal has made of line feeds what a terminal wants.
        let raw = self
            .terminal
            .then(|| RawTerminal::begin(&[], LineFeeds::AsItComes))
            .transpose()?;
        pass_signals(running.control()).context("hearing signals")?;
        let stdin: Box<dyn Read + Send> = match &raw {
            Some(_) => Box::new(Keys(io::stdin())),
            None => Box::new(io::stdin()),
        };
        let ended = running.pump(Some(stdin), &mut output.text(), &mut io::stderr());
        drop(raw);
        let exit = ended?;
        Ok(Outcome {
            status: exit.status(),
            report: json!({ "vm": self.vm, "status": exit.status() }),
        })
    }
}

/// What the program gets besides what the agent gives it: `term`, the kind of the terminal it is shown on, unless `given`
/// says another one.
fn environment(term: Option<OsString>, given: Vec<(String, String)>) -> Vec<(Bytes, Bytes)> {
    let term = term.map(|kind| (Bytes::from("TERM"), kind.into()));
    let given = given
        .into_iter()
        .map(|(name, value)| (bytes(name), bytes(value)));
    // Of two with one name the later counts.
    term.into_iter().chain(given).collect()
}

fn bytes(text: String) -> Bytes {
    Bytes(text.into_bytes())
}

/// The agent of a machine that runs, once the machine is itself: before, a clone has its parent's random numbers, and
/// its streams end when its driver hears of the fork (docs/vsock.md).
pub(super) fn agent_of(vm: &str) -> anyhow::Result<AgentClient> {
    agent_within(vm, REQUEST_LIMIT)
}

/// [`agent_of`] a machine, which has `limit` to become itself, and its agent as long for an answer.
pub(super) fn agent_within(vm: &str, limit: Duration) -> anyhow::Result<AgentClient> {
    let info = info_of(vm)?;
    let socket = text(&info, "vsock");
    anyhow::ensure!(
        !socket.is_empty(),
        "{vm} has no vsock, and no agent can be reached in it: start it with --kernel and --name, or with --vsock"
    );
    let deadline = Instant::now() + limit;
    loop {
        let agent = AgentClient::connect(socket.as_ref(), deadline)?.with_limit(limit);
        match agent.health() {
            Ok(Healthy {
                generation: Some(taken_on),
                ..
            }) if taken_on.to_string() == text(&info, "generation") => {
                return Ok(agent);
            }
            Err(error) if !error.may_pass() => return Err(error.into()),
            _ => {}
        }
        anyhow::ensure!(
            Instant::now() < deadline,
            "{vm} did not take on its identity within {} s: its console may say why",
            limit.as_secs()
        );
        thread::sleep(Duration::from_millis(20));
    }
}

/// Of the terminal that is standard input.
fn size() -> io::Result<Size> {
    let size = tcgetwinsize(io::stdin())?;
    Ok(Size {
        rows: size.ws_row,
        columns: size.ws_col,
    })
}

/// Passes on what this process is signalled, until it ends. A guest that hangs hears nothing: a second SIGTERM or SIGHUP ends
/// this process as it always does.
fn pass_signals(program: Control) -> io::Result<()> {
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGWINCH])?;
    let (to_program, heard) = channel();
    // In a thread of its own: a guest that takes no more bytes holds up whoever sends.
    let send = move || {
        for signal in heard {
            let sent = match signal {
                SIGWINCH => match size() {
                    Ok(size) => program.resize(size),
                    // Not a terminal, which has no size.
                    Err(_) => continue,
                },
                signal => program.signal(signal as u8),
            };
            if let Err(error) = sent {
                tracing::debug!(%error, signal, "a signal reaches the program no more");
            }
        }
    };
    let pass = move || {
        let mut to_end = false;
        for signal in signals.forever() {
            if matches!(signal, SIGTERM | SIGHUP) && std::mem::replace(&mut to_end, true) {
                raw_terminal::restore();
                if let Err(error) = emulate_default_handler(signal) {
                    tracing::error!(%error, signal, "a signal that should end this process did not");
                }
            }
            if to_program.send(signal).is_err() {
                return;
            }
        }
    };
    let start = |name: &str| thread::Builder::new().name(name.into());
    start("to-program").spawn(send)?;
    start("signals").spawn(pass)?;
    Ok(())
}

/// Standard input of a raw terminal: the key that leaves it ends this process, whatever the guest does.
struct Keys(io::Stdin);

impl Read for Keys {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = self.0.read(buffer)?;
        if buffer[..len].contains(&ESCAPE) {
            raw_terminal::restore();
            eprintln!("\nforkvm: left; the program is hung up on");
            signal_hook::low_level::exit(128 + SIGHUP);
        }
        Ok(len)
    }
}

fn variable(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("a variable is given as NAME=VALUE".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_on_a_terminal_hears_which_kind_it_is_and_the_user_has_the_last_word() {
        let variable = |value: &str| (Bytes::from("TERM"), Bytes::from(value));
        let shown_on = || Some("xterm".into());
        assert_eq!(environment(shown_on(), Vec::new()), [variable("xterm")]);
        let given = vec![("TERM".to_owned(), "dumb".to_owned())];
        assert_eq!(
            environment(shown_on(), given).last(),
            Some(&variable("dumb"))
        );
        assert!(environment(None, Vec::new()).is_empty());
    }
}
