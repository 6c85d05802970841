//! A program that a client runs: start, streams, signals, end.
//!
//! Threads of a session: this one copies the output and tells the end; one reads what the client sends ([`client`]), so that
//! a signal is heard whatever else waits; one feeds the standard input ([`pump`]); one copies the standard error, if it is apart.

mod account;
mod client;
mod command;
mod pump;
mod terminal;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::AtomicUsize;
use std::sync::mpsc::channel;
use std::thread;

use forkvm_agent_protocol::{AgentFrame, Bytes, Exec, Refusal, STDIN_WINDOW};

use crate::agent::Agent;
use crate::outbox::Outbox;
use crate::reaper::{self, Child};
use crate::refusal::{invalid, of_io};
use crate::session::Inbox;
use client::Client;
pub(crate) use command::controlled_by_its_stdin;
use terminal::Terminal;

/// A program that runs, and the agent's ends of its streams.
struct Running {
    child: Child,
    input: OwnedFd,
    output: OwnedFd,
    errors: Option<OwnedFd>,
    terminal: Option<Terminal>,
}

/// Runs `exec` and serves the session until the program has ended and its output is told.
pub(crate) fn run(
    agent: &Agent,
    exec: &Exec,
    inbox: Inbox,
    outbox: &Outbox,
) -> Result<(), Refusal> {
    // Before there is a program: a fork may come at once, and who this machine is then is the clone's.
    let born_as = agent.doorbell().who();
    let Running {
        child,
        input,
        output,
        errors,
        terminal,
    } = start(exec)?;
    let child = &child;
    let pid = child.pid();
    outbox.send_if_heard(&AgentFrame::Started { pid });
    let room = AtomicUsize::new(STDIN_WINDOW as usize);
    let (to_input, from_client) = channel();
    let client = Client {
        child,
        terminal: terminal.as_ref(),
        room: &room,
        born_as,
    };
    let has_terminal = terminal.is_some();
    thread::scope(|scope| {
        let start = |name: &str| thread::Builder::new().name(name.into());
        let threads = start("exec-client")
            .spawn_scoped(scope, || client.listen(agent, inbox, outbox, to_input))
            .and_then(|_| {
                let room = &room;
                // The descriptor is that thread's: the end of the input closes it.
                start("exec-stdin").spawn_scoped(scope, move || {
                    pump::input(input, has_terminal, child, &from_client, room, outbox);
                })
            })
            .and_then(|_| match errors {
                Some(errors) => start("exec-stderr")
                    .spawn_scoped(scope, move || pump::output(&errors, child, outbox, stderr))
                    .map(Some),
                None => Ok(None),
            });
        let errors = threads.unwrap_or_else(|error| {
            crate::log::line(&format!("a program gets no thread of the agent: {error}"));
            child.hang_up();
            None
        });
        pump::output(&output, child, outbox, stdout);
        let told = errors.is_none_or(|errors| errors.join().is_ok());
        outbox.send_if_heard(&match child.ended().wait(None) {
            Some(exit) if told => AgentFrame::Ended(exit),
            // `Ended` would say that all was told.
            _ => AgentFrame::Refused(Refusal {
                errno: libc::EIO,
                text: "a thread of the agent died, and some of the program's output with it".into(),
            }),
        });
        // The thread that reads the client's frames sees this, too.
        outbox.close();
    });
    Ok(())
}

fn stdout(bytes: &[u8]) -> AgentFrame {
    AgentFrame::Stdout(Bytes::from(bytes))
}

fn stderr(bytes: &[u8]) -> AgentFrame {
    AgentFrame::Stderr(Bytes::from(bytes))
}

fn start(exec: &Exec) -> Result<Running, Refusal> {
    let Some(program) = exec.argv.first().filter(|program| !program.0.is_empty()) else {
        return Err(invalid("a program to run has a name"));
    };
    let what = format!("running {:?}", program.as_os_str());
    let fail = |error: io::Error| of_io(&what, &error);
    let account = match &exec.user {
        Some(user) => Some(account::find(user).map_err(fail)?),
        None => None,
    };
    let terminal = match exec.terminal {
        Some(size) => Some(Terminal::open(size).map_err(fail)?),
        None => None,
    };
    let mut command = command::build(exec, account, terminal.as_ref()).map_err(fail)?;
    let spawned = reaper::spawn(&mut command).map_err(fail)?;
    // The program's own end of its terminal is in there: only without it the terminal ends with the program.
    drop(command);
    let child = spawned.child;
    let streams = match (terminal, spawned.stdin, spawned.stdout) {
        (Some(mut terminal), ..) => {
            terminal.let_go();
            let ends = terminal
                .master()
                .try_clone()
                .and_then(|input| Ok((input, terminal.master().try_clone()?)));
            ends.map(|(input, output)| (input, output, None, Some(terminal)))
        }
        (None, Some(input), Some(output)) => Ok((
            input.into(),
            output.into(),
            spawned.stderr.map(OwnedFd::from),
            None,
        )),
        (None, ..) => Err(io::Error::other("the program has no pipes")),
    };
    let prepared = streams.and_then(|(input, output, errors, terminal)| {
        pump::prepare(&input)?;
        pump::prepare(&output)?;
        if let Some(errors) = &errors {
            pump::prepare(errors)?;
        }
        Ok(Running {
            child: child.clone(),
            input,
            output,
            errors,
            terminal,
        })
    });
    prepared.map_err(|error| {
        child.hang_up();
        fail(error)
    })
}
