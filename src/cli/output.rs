//! Where results go: text for people, one JSON object for programs.

use std::fs::{self, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde_json::{Map, Value};

/// What came of a command.
pub(crate) struct Outcome {
    /// Exit code.
    pub(crate) status: u8,
    /// A JSON object; the version of forkvm is added.
    pub(crate) report: Value,
}

impl Outcome {
    /// All went well.
    pub(crate) fn done(report: Value) -> Outcome {
        Outcome { status: 0, report }
    }
}

/// Knows where the user wants JSON.
pub(crate) struct Output {
    json: Option<PathBuf>,
}

impl Output {
    pub(crate) fn new(json: Option<PathBuf>) -> Output {
        Output { json }
    }

    /// Where text goes: standard output, unless that is the JSON object's.
    pub(crate) fn text(&self) -> Box<dyn Write + Send> {
        if self.json_is_stdout() {
            Box::new(io::stderr())
        } else {
            Box::new(io::stdout())
        }
    }

    fn json_is_stdout(&self) -> bool {
        self.json.as_deref() == Some(Path::new("-"))
    }

    /// Writes the object, if the user wants it. Called once.
    pub(crate) fn write_json(&self, report: &Value) -> anyhow::Result<()> {
        let Some(path) = &self.json else {
            return Ok(());
        };
        let mut object = Map::new();
        object.insert("forkvm".into(), env!("CARGO_PKG_VERSION").into());
        if let Value::Object(report) = report {
            object.extend(report.clone());
        }
        let mut text = serde_json::to_string_pretty(&object)?;
        text.push('\n');
        if self.json_is_stdout() {
            return io::stdout()
                .write_all(text.as_bytes())
                .context("writing to standard output");
        }
        write_whole(path, text.as_bytes())
    }
}

/// Writes a file whole or not at all: what fails on the way, such as a full disk, leaves what was
/// there before, and no part of it. What is no file, such as a pipe, is written to as it is.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let place = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let write = || -> io::Result<()> {
        if fs::metadata(&place).is_ok_and(|there| !there.is_file()) {
            return fs::write(&place, bytes);
        }
        let dir = place.parent().filter(|dir| !dir.as_os_str().is_empty());
        let mut beside = tempfile::Builder::new()
            .prefix(".forkvm-")
            // As of any new file, which the umask narrows; a temporary one is the owner's alone.
            .permissions(Permissions::from_mode(0o666))
            .tempfile_in(dir.unwrap_or(Path::new(".")))?;
        beside.write_all(bytes)?;
        // A disk may say only now that it is full.
        beside.as_file().sync_all()?;
        beside.persist(&place)?;
        Ok(())
    };
    write().with_context(|| format!("writing {}", path.display()))
}
