//! The first line of a host's connection: `CONNECT <port>\n`, with the port in decimal.
//!
//! It is read byte by byte, so that what follows it stays in the stream: those are the first bytes
//! for the guest.

use std::io;

use super::host::HostStream;

/// Longest line, its end included: `CONNECT 4294967295\n`, and some blanks.
const LONGEST: usize = 32;

/// A stream whose line is not complete.
pub(super) struct Greeting<S> {
    stream: S,
    line: Vec<u8>,
}

/// What has become of a greeting.
pub(super) enum Greeted<S> {
    /// More has to come.
    Waits(Greeting<S>),
    /// The host wants this port of the guest.
    Wants(S, u32),
    /// It is no such line, or its sender has gone.
    Refused,
}

impl<S: HostStream> Greeting<S> {
    pub(super) fn new(stream: S) -> Greeting<S> {
        Greeting {
            stream,
            line: Vec::new(),
        }
    }

    /// Reads on.
    pub(super) fn go_on(mut self) -> Greeted<S> {
        while self.line.len() < LONGEST {
            let mut byte = [0];
            match self.stream.read(&mut byte) {
                Ok(1) if byte == *b"\n" => {
                    return match port(&self.line) {
                        Some(port) => Greeted::Wants(self.stream, port),
                        None => Greeted::Refused,
                    };
                }
                Ok(1) => self.line.extend(byte),
                Ok(_) => return Greeted::Refused,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Greeted::Waits(self);
                }
                Err(_) => return Greeted::Refused,
            }
        }
        Greeted::Refused
    }
}

/// The port that a line without its end asks for.
fn port(line: &[u8]) -> Option<u32> {
    let line = std::str::from_utf8(line).ok()?;
    let (word, port) = line.trim_end().split_once(' ')?;
    (word.eq_ignore_ascii_case("connect") && port.bytes().all(|byte| byte.is_ascii_digit()))
        .then(|| port.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::port;

    #[test]
    fn only_a_word_and_a_decimal_port_are_a_greeting() {
        for (line, wanted) in [
            ("CONNECT 52", Some(52)),
            ("connect 4294967295", Some(u32::MAX)),
            ("CONNECT 1\r", Some(1)),
            ("CONNECT 4294967296", None),
            ("CONNECT +1", None),
            ("CONNECT -1", None),
            ("CONNECT ", None),
            ("CONNECT", None),
            ("CONNECT 1 2", None),
            ("HELLO 1", None),
            ("", None),
        ] {
            assert_eq!(port(line.as_bytes()), wanted, "{line:?}");
        }
    }
}
