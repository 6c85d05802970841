//! `forkvm-guest fork`: this process goes on in the parent and in every clone.

use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use forkvm_agent_protocol::{AgentFrame, ClientFrame, Exit, Request};

use super::InsideError;
use super::arguments::Fork;
use super::connection::{Connection, unexpected};

/// Worst status that a process can exit with.
const WORST: u32 = 255;

pub(super) fn run(fork: &Fork) -> Result<u8, InsideError> {
    let mut agent = Connection::open()?;
    let clones = fork.clones;
    // From the answer on there are several of this process, each in a machine of its own.
    let forked = match agent.ask(Request::Fork { clones })? {
        AgentFrame::Forked(forked) => forked,
        other => return Err(unexpected(&other)),
    };
    if forked.clone_id != 0 {
        return in_clone(fork, forked.clone_id, &mut agent);
    }
    if fork.command.is_empty() {
        println!("0");
    } else {
        println!("{}", forked.granted);
    }
    if !fork.wait {
        return Ok(0);
    }
    agent.say(&ClientFrame::Join)?;
    match agent.hear()? {
        AgentFrame::Joined { status } => Ok(status.min(WORST) as u8),
        other => Err(unexpected(&other)),
    }
}

/// A command that cannot be run ends the clone as a shell would: with 127.
fn in_clone(fork: &Fork, clone_id: u32, agent: &mut Connection) -> Result<u8, InsideError> {
    let Some((program, arguments)) = fork.command.split_first() else {
        println!("{clone_id}");
        return Ok(0);
    };
    let ran = Command::new(program)
        .args(arguments)
        .env("FORKVM_CLONE_ID", clone_id.to_string())
        .status();
    let status = match &ran {
        Ok(status) => match (status.code(), status.signal()) {
            (Some(code), _) => code as u8,
            (None, signal) => Exit::Signal(signal.unwrap_or_default() as u8).status(),
        },
        Err(_) => 127,
    };
    if fork.exit {
        if let Err(source) = &ran {
            eprintln!("forkvm-guest: running {program:?} in clone {clone_id}: {source}");
        }
        agent.say(&ClientFrame::End(status))?;
        // The machine ends; a clone that does not says so by the end of the stream.
        return Err(agent
            .hear()
            .err()
            .unwrap_or(InsideError::Nonsense("this clone should have ended".into())));
    }
    ran.map(|_| status).map_err(|source| InsideError::Run {
        program: program.clone(),
        source,
    })
}
