//! The command line of the agent as a service. PID 1 takes none: its words are the kernel's.

use std::ffi::OsString;
use std::path::PathBuf;

use thiserror::Error;

/// What is listened on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Where the host is served.
    pub host: HostSocket,
    /// The socket for programs of the guest.
    pub local: Option<PathBuf>,
    /// Whether the fork doorbell is looked for.
    pub doorbell: bool,
    /// The directory of hooks.
    pub hooks: PathBuf,
}

/// Where the host is served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostSocket {
    /// A vsock port.
    Vsock(u32),
    /// A Unix socket that only its owner may open, for machines without vsock and for tests.
    Unix(PathBuf),
}

impl Default for Options {
    fn default() -> Options {
        Options {
            host: HostSocket::Vsock(forkvm_agent_protocol::PORT),
            local: Some(forkvm_agent_protocol::LOCAL_SOCKET.into()),
            doorbell: true,
            hooks: "/etc/forkvm/fork.d".into(),
        }
    }
}

/// How it is called.
pub const USAGE: &str = "usage: forkvm-agent [--vsock-port N | --unix PATH] [--local PATH | --no-local] [--no-doorbell] [--hooks DIR]";

/// What the arguments ask for.
///
/// # Errors
/// The argument that means nothing.
pub fn parse(arguments: impl Iterator<Item = OsString>) -> Result<Options, OptionsError> {
    let mut options = Options::default();
    let mut arguments = arguments;
    while let Some(argument) = arguments.next() {
        let name = argument.to_string_lossy().into_owned();
        let mut value = || {
            arguments
                .next()
                .ok_or_else(|| OptionsError::NoValue(name.clone()))
        };
        match name.as_str() {
            "--vsock-port" => {
                let port = value()?;
                let number = port.to_str().and_then(|port| port.parse().ok());
                options.host = HostSocket::Vsock(number.ok_or(OptionsError::NoPort(port))?);
            }
            "--unix" => options.host = HostSocket::Unix(value()?.into()),
            "--local" => options.local = Some(value()?.into()),
            "--no-local" => options.local = None,
            "--no-doorbell" => options.doorbell = false,
            "--hooks" => options.hooks = value()?.into(),
            _ => return Err(OptionsError::Unknown(name)),
        }
    }
    Ok(options)
}

/// A command line that means nothing.
#[derive(Debug, Error)]
pub enum OptionsError {
    /// No such option.
    #[error("{0:?} is no option of the agent; {USAGE}")]
    Unknown(String),
    /// Its value is missing.
    #[error("{0} wants a value; {USAGE}")]
    NoValue(String),
    /// Not a number of 32 bits.
    #[error("{0:?} is no vsock port: a number is")]
    NoPort(OsString),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(words: &[&str]) -> Result<Options, OptionsError> {
        parse(words.iter().map(OsString::from))
    }

    #[test]
    fn without_options_it_listens_on_vsock_and_for_the_guests_programs() {
        let options = parsed(&[]).unwrap();
        assert_eq!(options.host, HostSocket::Vsock(1024));
        assert!(options.doorbell && options.local.is_some());
    }

    #[test]
    fn a_unix_socket_takes_the_place_of_vsock() {
        let options = parsed(&["--unix", "/a", "--no-local", "--no-doorbell"]).unwrap();
        assert_eq!(options.host, HostSocket::Unix("/a".into()));
        assert!(!options.doorbell && options.local.is_none());
    }

    #[test]
    fn what_means_nothing_is_named() {
        for (words, said) in [
            (&["--port"][..], "--port"),
            (&["--unix"], "--unix wants"),
            (&["--vsock-port", "x"], "\"x\""),
        ] {
            let text = parsed(words).unwrap_err().to_string();
            assert!(text.contains(said), "{text}");
        }
    }
}
