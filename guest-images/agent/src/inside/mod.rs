//! `forkvm-guest`: what programs inside a machine ask of it. Any user may fork; root may power off.

mod arguments;
mod connection;
mod fork;

use std::ffi::OsString;
use std::process::ExitCode;

use forkvm_agent_protocol::{AgentFrame, Request};
use thiserror::Error;

use arguments::Action;
use connection::Connection;

/// Exit code of a command line that means nothing.
const USAGE_ERROR: u8 = 2;

/// The command; `words` are those after its name.
pub fn main(words: Vec<OsString>) -> ExitCode {
    let action = match arguments::parse(words) {
        Ok(action) => action,
        Err(error) => {
            eprintln!("forkvm-guest: {error}");
            return ExitCode::from(USAGE_ERROR);
        }
    };
    let done = match action {
        Action::Help => {
            println!("{}", arguments::USAGE);
            Ok(0)
        }
        Action::Id => id(),
        Action::PowerOff => power_off(),
        Action::Fork(fork) => fork::run(&fork),
    };
    match done {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("forkvm-guest: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Prints `CLONE_ID GENERATION`.
fn id() -> Result<u8, InsideError> {
    let mut agent = Connection::open()?;
    match agent.ask(Request::Health)? {
        AgentFrame::Healthy(healthy) => {
            let (Some(clone_id), Some(generation)) = (healthy.clone_id, healthy.generation) else {
                return Err(InsideError::NobodyYet);
            };
            println!("{clone_id} {generation}");
            Ok(0)
        }
        other => Err(connection::unexpected(&other)),
    }
}

fn power_off() -> Result<u8, InsideError> {
    let mut agent = Connection::open()?;
    match agent.ask(Request::PowerOff)? {
        AgentFrame::PoweringOff => Ok(0),
        other => Err(connection::unexpected(&other)),
    }
}

/// Why it failed.
#[derive(Debug, Error)]
enum InsideError {
    #[error("{path}: {source}; is forkvm-agent running in this machine?")]
    NoAgent {
        path: String,
        source: std::io::Error,
    },
    #[error("{0}")]
    Refused(String),
    #[error("speaking to the agent: {0}")]
    Stream(#[from] forkvm_agent_protocol::FrameError),
    #[error("the agent speaks nonsense: {0}")]
    Nonsense(String),
    #[error("the host has not told this machine yet who it is")]
    NobodyYet,
    #[error("running {program:?}: {source}")]
    Run {
        program: OsString,
        source: std::io::Error,
    },
}
