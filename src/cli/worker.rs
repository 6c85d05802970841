//! `forkvm worker`: the process in which clones live whose parents live in another one.
//!
//! Started by the engine, which is at the other end of standard input; never by hand.

use std::io;
use std::os::fd::AsFd;

use anyhow::Context;
use forkvm::{WorkerProgram, worker};

use super::log;
use super::output::Outcome;

/// Comes back only with an error.
pub(crate) fn run() -> anyhow::Result<Outcome> {
    let socket = io::stdin().as_fd().try_clone_to_owned();
    let socket = socket.context("taking over standard input")?;
    match worker::serve(socket)? {}
}

/// This program, as a worker that logs as this process does.
pub(crate) fn program() -> anyhow::Result<WorkerProgram> {
    let path = std::env::current_exe().context("finding this program, to start workers from it")?;
    let mut args = vec!["worker".into()];
    if let Some(filter) = log::option() {
        args.extend(["--log".into(), filter.into()]);
    }
    Ok(WorkerProgram { path, args })
}
