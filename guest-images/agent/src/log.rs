//! Lines for whoever reads the agent's standard error: the console, where it is PID 1.

use std::io::{self, Write};

/// One line. Where nobody can read it there is nobody to tell either, so a failure is no error.
pub fn line(text: &str) {
    io::stderr()
        .write_all(format!("forkvm-agent: {text}\n").as_bytes())
        .unwrap_or_default();
}
