//! FASTQ text: records one after the other, and where one starts in the middle of a file.
//!
//! The four-line form only (title, bases, `+`, qualities), which is what every sequencer writes;
//! a record whose bases are wrapped over several lines is refused.

use core::fmt;

/// One read, borrowed from the text it was found in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record<'a> {
    /// The title up to its first blank, without the `@`.
    pub name: &'a [u8],
    /// Letters as sequenced; may be empty.
    pub bases: &'a [u8],
    /// As many quality characters (Phred + 33) as bases.
    pub qualities: &'a [u8],
}

/// Iterator over the records of a text that starts with one.
///
/// It ends after the first error: what follows cannot be trusted to start at a record.
#[derive(Clone, Debug)]
pub struct Records<'a> {
    bytes: &'a [u8],
    offset: usize,
}

impl<'a> Records<'a> {
    /// Reads from the first byte on; blank lines at the end are allowed.
    pub fn new(bytes: &'a [u8]) -> Records<'a> {
        Records { bytes, offset: 0 }
    }

    /// Offset of the record that [`Iterator::next`] will return.
    pub fn offset(&self) -> usize {
        self.offset
    }

    fn line(&mut self) -> &'a [u8] {
        let rest = &self.bytes[self.offset..];
        let len = rest
            .iter()
            .position(|&byte| byte == b'\n')
            .unwrap_or(rest.len());
        self.offset += rest.len().min(len + 1);
        rest[..len].strip_suffix(b"\r").unwrap_or(&rest[..len])
    }

    fn record(&mut self) -> Result<Record<'a>, ErrorKind> {
        let title = self.line().strip_prefix(b"@").ok_or(ErrorKind::NoTitle)?;
        let name = title
            .split(u8::is_ascii_whitespace)
            .next()
            .unwrap_or_default();
        if !is_sam_query_name(name) {
            return Err(ErrorKind::BadName);
        }
        let bases = self.line();
        if !bases.iter().all(u8::is_ascii_alphabetic) {
            return Err(ErrorKind::BadBase);
        }
        if self.offset == self.bytes.len() {
            return Err(ErrorKind::Truncated);
        }
        if !self.line().starts_with(b"+") {
            return Err(ErrorKind::NoPlus);
        }
        let qualities = self.line();
        let cut = !self.bytes.ends_with(b"\n") || qualities.is_empty();
        if qualities.len() < bases.len() && self.offset == self.bytes.len() && cut {
            return Err(ErrorKind::Truncated);
        }
        if qualities.len() != bases.len() {
            return Err(ErrorKind::UnequalLength);
        }
        if !qualities.iter().all(u8::is_ascii_graphic) {
            return Err(ErrorKind::BadQuality);
        }
        Ok(Record {
            name,
            bases,
            qualities,
        })
    }
}

impl<'a> Iterator for Records<'a> {
    type Item = Result<Record<'a>, FastqError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.bytes[self.offset..]
            .iter()
            .all(u8::is_ascii_whitespace)
        {
            return None;
        }
        let offset = self.offset;
        let record = self.record().map_err(|kind| FastqError { offset, kind });
        if record.is_err() {
            self.offset = self.bytes.len();
        }
        Some(record)
    }
}

/// Offset of the first record that starts at `from` or later: of a line that begins with `@` and
/// whose second next line begins with `+`. A quality line that begins with `@` is not taken for
/// one, because the second line after it holds bases.
///
/// The byte at `from` begins a line if `from` is 0 or a line feed stands before it, so a caller
/// that looks into the middle of a file includes the byte before and passes 1. All who ask about
/// one file get the same boundaries: a share `[a, b)` of a file is the records that start in it.
///
/// `None` if there is none, or if `bytes` end before that third line begins.
pub fn record_start(bytes: &[u8], from: usize) -> Option<usize> {
    let next_line = |at: usize| {
        let rest = bytes.get(at..)?;
        Some(at + rest.iter().position(|&byte| byte == b'\n')? + 1)
    };
    let mut line = match from.checked_sub(1) {
        None => 0,
        Some(before) => next_line(before)?,
    };
    loop {
        let third = next_line(next_line(line)?)?;
        if *bytes.get(line)? == b'@' && *bytes.get(third)? == b'+' {
            return Some(line);
        }
        line = next_line(line)?;
    }
}

/// SAM 1.6, section 1.4, field 1: what a read may be called.
fn is_sam_query_name(name: &[u8]) -> bool {
    (1..=254).contains(&name.len())
        && name
            .iter()
            .all(|&byte| byte.is_ascii_graphic() && byte != b'@')
}

/// A record that is not FASTQ, or cannot be written as SAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FastqError {
    /// Where the record starts in the text.
    pub offset: usize,
    /// What is wrong with it.
    pub kind: ErrorKind,
}

/// What is wrong with a FASTQ record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// Its first line does not begin with `@`.
    NoTitle,
    /// Its name is empty, longer than 254 bytes, or has a character that SAM forbids.
    BadName,
    /// Its second line has something else than letters.
    BadBase,
    /// Its third line does not begin with `+`.
    NoPlus,
    /// Its fourth line is not as long as its second.
    UnequalLength,
    /// A quality is not a printable character.
    BadQuality,
    /// The text ends within it.
    Truncated,
}

impl fmt::Display for FastqError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.kind {
            ErrorKind::NoTitle => "its first line does not begin with '@'",
            ErrorKind::BadName => "its name cannot be a query name in SAM (1.6, section 1.4)",
            ErrorKind::BadBase => "its second line has other characters than letters",
            ErrorKind::NoPlus => "its third line does not begin with '+' (wrapped bases?)",
            ErrorKind::UnequalLength => "it has not as many qualities as bases",
            ErrorKind::BadQuality => "a quality is not a printable character",
            ErrorKind::Truncated => "the text ends within it (an incomplete file?)",
        };
        write!(
            f,
            "FASTQ: record at byte {} refused: {what}; mend or remove it",
            self.offset
        )
    }
}

impl core::error::Error for FastqError {}
