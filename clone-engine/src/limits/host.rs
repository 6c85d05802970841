//! Files of /proc that hold numbers.

use std::fs;
use std::io;

/// The text of `file`; an error names it.
pub(crate) fn read(file: &str) -> io::Result<String> {
    fs::read_to_string(file)
        .map_err(|error| io::Error::new(error.kind(), format!("reading {file} failed: {error}")))
}

/// The number that is all that `file` holds.
pub(super) fn number(file: &str) -> io::Result<u64> {
    let text = read(file)?;
    let number = text.trim().parse();
    number.map_err(|_| io::Error::other(format!("{file} holds no number: {text:?}")))
}

/// The value of the line `name:  value kB`.
pub(crate) fn kib(text: &str, name: &str) -> Option<u64> {
    field(text, name)?.strip_suffix("kB")?.trim().parse().ok()
}

/// What stands behind `name:` in a text of such lines.
pub(super) fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let behind = |line: &'a str| line.strip_prefix(name)?.strip_prefix(':');
    text.lines().find_map(behind).map(str::trim)
}
