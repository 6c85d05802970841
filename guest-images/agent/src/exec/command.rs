//! A command as the standard library starts it, out of what a client asks for.

#![allow(unsafe_code)] // What a child does between fork and exec.

use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use forkvm_agent_protocol::Exec;
use rustix::fs::fchown;
use rustix::process::{Gid, Uid, ioctl_tiocsctty, setsid};
use rustix::stdio::{stderr, stdin, stdout};
use rustix::thread::{set_thread_gid, set_thread_groups, set_thread_uid};

use super::account::Account;
use super::terminal::Terminal;
use crate::init::PATH;

/// It leads a process group of its own; with a terminal, a session of its own that the terminal controls.
pub(super) fn build(
    exec: &Exec,
    account: Option<Account>,
    terminal: Option<&Terminal>,
) -> io::Result<Command> {
    let mut words = exec.argv.iter().map(|word| word.as_os_str());
    let mut command = Command::new(words.next().unwrap_or_default());
    command.args(words);
    let (name, home) = match &account {
        Some(account) => (account.name.as_str(), account.home.as_str()),
        None => ("root", "/root"),
    };
    command.env_clear().env("PATH", PATH);
    command.env("HOME", home).env("USER", name);
    for (name, value) in &exec.env {
        let name = name.as_os_str();
        if name.is_empty() || name.as_encoded_bytes().contains(&b'=') {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("a variable cannot be called {name:?}"),
            ));
        }
        command.env(name, value.as_os_str());
    }
    match &exec.directory {
        Some(directory) => command.current_dir(directory.as_path()),
        None if Path::new(home).is_dir() => command.current_dir(home),
        None => command.current_dir("/"),
    };
    match terminal {
        Some(terminal) => {
            command
                .stdin(terminal.slave()?)
                .stdout(terminal.slave()?)
                .stderr(terminal.slave()?);
        }
        None => {
            command
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .process_group(0);
        }
    }
    in_child(&mut command, terminal.is_some(), account);
    Ok(command)
}

/// A session of its own with the terminal at its standard input, for whoever starts a shell.
pub(crate) fn controlled_by_its_stdin(command: &mut Command) {
    in_child(command, true, None);
}

fn in_child(command: &mut Command, terminal: bool, account: Option<Account>) {
    if !terminal && account.is_none() {
        return;
    }
    let become_user = account.map(|account| (account.uid, account.gid, account.groups));
    let prepare = move || {
        if terminal {
            take_terminal()?;
        }
        if let Some((uid, gid, groups)) = &become_user {
            take_streams(*uid)?;
            take_user(*uid, *gid, groups)?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec only system calls are made (rustix makes them itself, without the C library), nothing is
    // allocated and no lock is taken.
    unsafe { command.pre_exec(prepare) };
}

fn take_terminal() -> io::Result<()> {
    setsid()?;
    ioctl_tiocsctty(stdin())?;
    Ok(())
}

/// Pipes and terminals belong to who made them, and only their owner can open them by /dev/stderr, or what `tty` says.
fn take_streams(uid: Uid) -> io::Result<()> {
    for stream in [stdin(), stdout(), stderr()] {
        fchown(stream, Some(uid), None)?;
    }
    Ok(())
}

/// The child has one thread, so what is set for the thread is set for it. The user last: it may no longer set the rest then.
fn take_user(uid: Uid, gid: Gid, groups: &[Gid]) -> io::Result<()> {
    set_thread_groups(groups)?;
    set_thread_gid(gid)?;
    set_thread_uid(uid)?;
    Ok(())
}
