//! Lines of a stream, of a limited length. What comes behind the last whole line is kept for the next call.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use thiserror::Error;

/// How much is read at once.
const CHUNK: usize = 16 * 1024;

/// See the module's text.
#[derive(Debug)]
pub(super) struct Lines {
    stream: UnixStream,
    longest: usize,
    read: Vec<u8>,
    /// Bytes of `read` that hold no end of a line.
    searched: usize,
}

/// Why there is no next line.
#[derive(Debug, Error)]
pub(super) enum LineError {
    #[error("a line is longer than {0} bytes")]
    TooLong(usize),
    #[error("reading from the control socket failed")]
    Read(#[from] io::Error),
}

impl Lines {
    /// Of `stream`, none longer than `longest` bytes without its end.
    pub(super) fn new(stream: UnixStream, longest: usize) -> Lines {
        Lines {
            stream,
            longest,
            read: Vec::new(),
            searched: 0,
        }
    }

    /// The next line, without its end; `None` when there are no more. What lacks an end is no line.
    pub(super) fn next(&mut self) -> Result<Option<Vec<u8>>, LineError> {
        loop {
            if let Some(line) = self.take()? {
                return Ok(Some(line));
            }
            if !self.fill()? {
                return Ok(None);
            }
        }
    }

    /// A line that has been read already.
    pub(super) fn take(&mut self) -> Result<Option<Vec<u8>>, LineError> {
        let new = &self.read[self.searched..];
        let end = new.iter().position(|byte| *byte == b'\n');
        let end = end.map(|at| self.searched + at);
        if end.unwrap_or(self.read.len()) > self.longest {
            return Err(LineError::TooLong(self.longest));
        }
        let Some(end) = end else {
            self.searched = self.read.len();
            return Ok(None);
        };
        let rest = self.read.split_off(end + 1);
        let mut line = std::mem::replace(&mut self.read, rest);
        line.pop();
        self.searched = 0;
        Ok(Some(line))
    }

    /// Reads once, which may wait; `false` at the end of the stream.
    pub(super) fn fill(&mut self) -> Result<bool, LineError> {
        let mut chunk = [0; CHUNK];
        loop {
            match self.stream.read(&mut chunk) {
                Ok(0) => return Ok(false),
                Ok(len) => {
                    self.read.extend_from_slice(&chunk[..len]);
                    return Ok(true);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The stream, to be waited for.
    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Writes to the other end.
    pub(super) fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(sent: &[u8], longest: usize) -> Lines {
        let (mut here, there) = UnixStream::pair().unwrap();
        here.write_all(sent).unwrap();
        Lines::new(there, longest)
    }

    #[test]
    fn lines_come_one_by_one_and_what_lacks_an_end_is_none() {
        let mut lines = lines(b"one\n\ntwo\nthr", 8);
        for due in ["one", "", "two"] {
            assert_eq!(lines.next().unwrap().unwrap(), due.as_bytes());
        }
        assert!(lines.next().unwrap().is_none());
    }

    #[test]
    fn a_line_may_be_as_long_as_is_said_and_no_longer() {
        assert_eq!(lines(b"12345678\n", 8).next().unwrap().unwrap().len(), 8);
        let error = lines(b"123456789\n", 8).next().unwrap_err();
        assert!(matches!(error, LineError::TooLong(8)));
        let endless = lines(b"123456789", 8).next().unwrap_err();
        assert!(matches!(endless, LineError::TooLong(8)));
    }
}
