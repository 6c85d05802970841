//! A shell for whoever sits at the console.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::process::Command;

use super::PATH;
use crate::exec::controlled_by_its_stdin;
use crate::log;
use crate::reaper;

/// The console as the kernel gives it: it is no terminal that can control a session.
pub(super) fn open() -> io::Result<File> {
    open_at("/dev/console")
}

fn open_at(path: &str) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(path)
}

/// Starts a shell whose terminal the console is. There is none where there is no console. The machine lives on when it ends.
pub(super) fn start_shell() {
    let Ok(terminal) = terminal() else { return };
    if let Err(error) = start(terminal) {
        log::line(&format!("starting a shell on the console: {error}"));
    }
}

/// The device behind the console: the last that the kernel names.
fn terminal() -> io::Result<File> {
    let active = fs::read_to_string("/sys/class/tty/console/active")?;
    let name = active.split_whitespace().last().unwrap_or("console");
    open_at(&format!("/dev/{name}"))
}

fn start(terminal: File) -> io::Result<()> {
    let mut command = Command::new("sh");
    command.env("PATH", PATH).env("HOME", "/root");
    command.env("TERM", "linux");
    command.stdout(terminal.try_clone()?);
    command.stderr(terminal.try_clone()?);
    command.stdin(terminal);
    controlled_by_its_stdin(&mut command);
    reaper::spawn(&mut command).map(drop)
}
