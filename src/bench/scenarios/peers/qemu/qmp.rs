//! What is said to QEMU: as much of its machine protocol as a save needs.
//!
//! A command and its answer are each a line of JSON; events in between are not listened to.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::process::path_of;

/// Far more than it takes: QEMU does not say what it has taken, and nobody's clock runs.
const PASSES: u32 = 16;
const BETWEEN_PASSES: Duration = Duration::from_millis(10);

/// A connection to a running QEMU.
pub(super) struct Monitor {
    socket: UnixStream,
    lines: BufReader<UnixStream>,
}

impl Monitor {
    /// Waits for QEMU's greeting. No later answer may take longer than `deadline`.
    pub(super) fn connect(socket: UnixStream, deadline: Duration) -> io::Result<Monitor> {
        socket.set_read_timeout(Some(deadline))?;
        let lines = BufReader::new(socket.try_clone()?);
        let mut monitor = Monitor { socket, lines };
        monitor.next()?;
        monitor.call("qmp_capabilities", json!({}))?;
        Ok(monitor)
    }

    /// Stops the VM.
    pub(super) fn stop(&mut self) -> io::Result<()> {
        self.call("stop", json!({})).map(drop)
    }

    /// Comes back when QEMU has taken a byte that waits for it on a console: each command passes its main
    /// loop, which serves what is ready.
    pub(super) fn pass_main_loop(&mut self) -> io::Result<()> {
        for _ in 0..PASSES {
            self.call("query-status", json!({}))?;
            thread::sleep(BETWEEN_PASSES);
        }
        Ok(())
    }

    /// Saves the VM and waits until that is done.
    pub(super) fn save_to(&mut self, file: &File, deadline: Duration) -> io::Result<()> {
        let uri = format!("exec:cat >{}", path_of(file));
        self.call("migrate", json!({ "uri": uri }))?;
        let begun = Instant::now();
        loop {
            let answer = self.call("query-migrate", json!({}))?;
            match answer["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed") => return Err(refused("migrate", &answer)),
                _ if begun.elapsed() > deadline => return Err(refused("migrate", &answer)),
                _ => thread::sleep(Duration::from_millis(10)),
            }
        }
    }

    fn call(&mut self, command: &str, arguments: Value) -> io::Result<Value> {
        let line = json!({ "execute": command, "arguments": arguments });
        writeln!(self.socket, "{line}")?;
        loop {
            let mut answer = self.next()?;
            if !answer["return"].is_null() {
                return Ok(answer["return"].take());
            }
            if !answer["error"].is_null() {
                return Err(refused(command, &answer["error"]));
            }
        }
    }

    fn next(&mut self) -> io::Result<Value> {
        let mut line = String::new();
        if self.lines.read_line(&mut line)? == 0 {
            return Err(io::Error::other("QEMU ended"));
        }
        serde_json::from_str(&line).map_err(io::Error::from)
    }
}

fn refused(command: &str, answer: &Value) -> io::Error {
    io::Error::other(format!("QEMU's answer to {command} is {answer}"))
}
