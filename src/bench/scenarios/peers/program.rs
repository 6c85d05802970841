//! A program of the host's: what starting anything at all takes.
//!
//! `/bin/echo`, by the standard library, which asks for posix_spawn: a child that shares the
//! parent's memory until its exec, so nothing of this process is copied as by fork() alone. The first
//! action is the first byte of its output, read from a pipe.

use std::io::{ErrorKind, Read};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::bench::measure::{BenchError, call};

use super::Peer;

const PROGRAM: &str = "/bin/echo";

/// See the module's text.
pub(super) struct Program;

impl Peer for Program {
    fn name(&self) -> &'static str {
        "fork+exec"
    }

    fn prepare(&mut self) -> Result<(), BenchError> {
        if Path::new(PROGRAM).is_file() {
            return Ok(());
        }
        let why = format!("{PROGRAM} is missing; install it: apt-get install coreutils");
        Err(BenchError::Lacks(why))
    }

    fn start(&mut self) -> Result<Duration, BenchError> {
        let failed = call("starting /bin/echo");
        let mut command = Command::new(PROGRAM);
        command.arg("here").stdin(Stdio::null());
        command.stdout(Stdio::piped());
        let asked = Instant::now();
        let mut child = command.spawn().map_err(&failed)?;
        let mut first = [0];
        let heard = match &mut child.stdout {
            Some(output) => output.read_exact(&mut first),
            None => Err(ErrorKind::BrokenPipe.into()),
        };
        let took = asked.elapsed();
        // Waited for in any case, so that nothing is left of it.
        child.wait().map_err(&failed)?;
        heard.map_err(&failed)?;
        Ok(took)
    }
}
