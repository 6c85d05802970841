//! A command at the other end of a control socket.

use std::io;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::Value;

use super::lines::{LineError, Lines};
use super::place::Places;
use super::protocol::{self, Failure, LONGEST_ANSWER, Request};

/// How long a process may take over what it only has to look up.
const PATIENCE: Duration = Duration::from_secs(10);

/// A connection to the process that runs a machine.
pub(crate) struct Connection {
    lines: Lines,
    machine: String,
}

/// What is found under a name.
pub(crate) enum Reached {
    Connected(Connection),
    /// A process holds the name, and does not listen yet, or not any more.
    Silent {
        /// Its id.
        process: String,
    },
    Nobody,
}

impl Connection {
    /// To the machine that `vm` is of: the longest part of its name, up to a dot, under which one runs.
    pub(crate) fn to(vm: &str) -> anyhow::Result<Connection> {
        let places = Places::of_user()?;
        let mut name = vm;
        loop {
            // A clone may have a longer name than a machine can.
            if let (Err(_), Some(dot)) = (places.socket(name), name.rfind('.')) {
                name = &name[..dot];
                continue;
            }
            match Connection::to_machine(&places, name)? {
                Reached::Connected(connection) => return Ok(connection),
                Reached::Silent { process } => bail!(
                    "machine {name} cannot be asked: process {process} is just starting or ending it"
                ),
                Reached::Nobody => {}
            }
            match name.rfind('.') {
                Some(dot) => name = &name[..dot],
                None => bail!(
                    "no machine {vm} runs, nor one that it could be a clone of: `forkvm ps` lists those that do; a \
                     machine can be asked if it was started with --name, by the same user and with the same \
                     XDG_RUNTIME_DIR"
                ),
            }
        }
    }

    /// To the machine of exactly this name.
    pub(crate) fn to_machine(places: &Places, name: &str) -> anyhow::Result<Reached> {
        let path = places.socket(name)?;
        places.check(name)?;
        match UnixStream::connect(&path) {
            Ok(stream) => Ok(Reached::Connected(Connection {
                lines: Lines::new(stream, LONGEST_ANSWER),
                machine: name.to_owned(),
            })),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound
                        | io::ErrorKind::NotADirectory
                        | io::ErrorKind::ConnectionRefused
                ) =>
            {
                Ok(match places.holder(name)? {
                    Some(process) => Reached::Silent { process },
                    None => Reached::Nobody,
                })
            }
            Err(error) => Err(error).with_context(|| format!("connecting to {}", path.display())),
        }
    }

    /// Asks, and waits for the answer.
    pub(crate) fn ask(&mut self, request: &Request) -> anyhow::Result<Value> {
        let sent = self.lines.send(&protocol::to_line(request)?);
        // Who refuses a client says why and hangs up, maybe before it has asked.
        match (self.next_line()?, sent) {
            (None, Err(error)) => Err(error).with_context(|| self.about("asking")),
            (answer, _) => self.outcome(answer),
        }
    }

    /// Asks for what is answered later ([`Connection::answer_within`]).
    pub(crate) fn begin(&mut self, request: &Request) -> anyhow::Result<()> {
        let sent = self.lines.send(&protocol::to_line(request)?);
        sent.with_context(|| self.about("asking"))
    }

    /// The answer to what was begun; `None` if it does not come in time.
    pub(crate) fn answer_within(&mut self, limit: Duration) -> anyhow::Result<Option<Value>> {
        let limited = self.lines.stream().set_read_timeout(Some(limit));
        limited.with_context(|| self.about("hearing"))?;
        match self.lines.next() {
            Err(LineError::Read(error)) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            line => {
                let line = line.with_context(|| self.about("hearing"))?;
                self.outcome(line).map(Some)
            }
        }
    }

    fn outcome(&self, answer: Option<Vec<u8>>) -> anyhow::Result<Value> {
        match answer {
            Some(line) => Ok(protocol::outcome(&line)?),
            None => bail!("machine {} ended before it answered", self.machine),
        }
    }

    /// Asks for what needs no work of the machine. A process that was stopped answers nobody: that is an error here.
    pub(crate) fn look_up(&mut self, request: &Request) -> anyhow::Result<Value> {
        let stream = self.lines.stream();
        let limited = stream
            .set_read_timeout(Some(PATIENCE))
            .and_then(|()| stream.set_write_timeout(Some(PATIENCE)));
        limited.with_context(|| self.about("asking"))?;
        self.ask(request)
    }

    /// The next line; `None` when the machine has hung up.
    pub(crate) fn next_line(&mut self) -> anyhow::Result<Option<Vec<u8>>> {
        match self.lines.next() {
            Err(LineError::Read(error)) if error.kind() == io::ErrorKind::ConnectionReset => {
                Ok(None)
            }
            Err(LineError::Read(error)) if error.kind() == io::ErrorKind::WouldBlock => bail!(
                "machine {} did not answer within {} s: was its process stopped?",
                self.machine,
                PATIENCE.as_secs()
            ),
            line => line.with_context(|| self.about("hearing")),
        }
    }

    /// The same, as what it says on a console.
    pub(crate) fn next_shown(&mut self) -> anyhow::Result<Option<protocol::Shown>> {
        let line = self.next_line()?;
        let shown = line.map(|line| protocol::from_line(&line));
        Ok(shown.transpose()?)
    }

    /// Another handle, to type on a console by.
    pub(crate) fn typist(&self) -> io::Result<Typist> {
        Ok(Typist(self.lines.stream().try_clone()?))
    }

    fn about(&self, what: &str) -> String {
        format!("{what} machine {}", self.machine)
    }
}

/// Types on a console that another thread shows.
pub(crate) struct Typist(UnixStream);

impl Typist {
    pub(crate) fn type_in(&mut self, bytes: &[u8]) -> io::Result<()> {
        let typed = protocol::Typed::Input(protocol::Bytes(bytes.to_vec()));
        io::Write::write_all(&mut self.0, &protocol::to_line(&typed)?)
    }

    /// Ends the connection, also for the thread that shows it.
    pub(crate) fn hang_up(&self) -> io::Result<()> {
        self.0.shutdown(std::net::Shutdown::Both)
    }
}

impl Failure {
    /// Whether it is the request that was wrong.
    pub(crate) fn is_usage(&self) -> bool {
        self.kind == protocol::Kind::Usage
    }
}
