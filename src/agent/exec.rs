//! A program that runs in the guest, and the streams of a command line.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;

use forkvm_agent_protocol::{AgentFrame, Bytes, ClientFrame, Exit, STDIN_WINDOW, Size, frame};

use super::error::AgentError;
use super::session::Session;

/// A program that was started. Dropped, it is hung up on: its process group gets SIGHUP, and SIGKILL 2 s later.
pub struct Running {
    session: Session,
    pid: u32,
    outgoing: Arc<Outgoing>,
}

/// Signals and sizes for a running program, from any thread.
#[derive(Clone)]
pub struct Control {
    outgoing: Arc<Outgoing>,
}

/// The host's half of the stream, shared by whoever sends.
struct Outgoing {
    stream: Mutex<UnixStream>,
    input: Mutex<Input>,
    changed: Condvar,
}

/// Of the program's input.
struct Input {
    /// Bytes that may be sent.
    room: usize,
    /// The program has ended.
    over: bool,
}

impl Running {
    pub(super) fn of(mut session: Session) -> Result<Running, AgentError> {
        let pid = match session.hear()? {
            AgentFrame::Started { pid } => pid,
            other => return Err(AgentError::unexpected(&other)),
        };
        session.wait_without_limit()?;
        let stream = session.stream().try_clone().map_err(AgentError::Broken)?;
        let outgoing = Outgoing {
            stream: Mutex::new(stream),
            input: Mutex::new(Input {
                room: STDIN_WINDOW as usize,
                over: false,
            }),
            changed: Condvar::new(),
        };
        Ok(Running {
            session,
            pid,
            outgoing: Arc::new(outgoing),
        })
    }

    /// Its number in the guest.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// What sends it signals while it is pumped.
    pub fn control(&self) -> Control {
        Control {
            outgoing: self.outgoing.clone(),
        }
    }

    /// Copies its streams until it has ended. Without `stdin` its input is empty. `stdin` is read by a thread that outlives
    /// this call while its read lasts, as that of a terminal does; what it has read by then is lost.
    ///
    /// # Errors
    /// [`AgentError::Sink`] where an output takes no more, [`AgentError::Broken`] where the machine ended: the program is
    /// hung up on.
    pub fn pump(
        mut self,
        stdin: Option<Box<dyn Read + Send>>,
        stdout: &mut dyn Write,
        stderr: &mut dyn Write,
    ) -> Result<Exit, AgentError> {
        match stdin {
            Some(stdin) => {
                let outgoing = self.outgoing.clone();
                thread::Builder::new()
                    .name("exec-stdin".into())
                    .spawn(move || outgoing.feed(stdin))
                    .map_err(AgentError::Thread)?;
            }
            None => self.outgoing.end(),
        }
        loop {
            match self.session.hear()? {
                AgentFrame::Stdout(Bytes(bytes)) => copy(&bytes, stdout)?,
                AgentFrame::Stderr(Bytes(bytes)) => copy(&bytes, stderr)?,
                AgentFrame::StdinRoom(more) => self.outgoing.grow(more as usize),
                AgentFrame::Ended(exit) => return Ok(exit),
                other => return Err(AgentError::unexpected(&other)),
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.outgoing.end_input();
        // Not by way of the lock: whoever holds it may wait for an agent that does not read.
        if let Err(error) = self.session.stream().shutdown(Shutdown::Both)
            && error.kind() != ErrorKind::NotConnected
        {
            tracing::debug!("ending a session with the agent: {error}");
        }
    }
}

fn copy(bytes: &[u8], to: &mut dyn Write) -> Result<(), AgentError> {
    to.write_all(bytes)
        .and_then(|()| to.flush())
        .map_err(AgentError::Sink)
}

impl Control {
    /// Sends a signal, by its number in Linux, to the program's process group: 1 to 31.
    ///
    /// # Errors
    /// [`AgentError::Broken`]: the program has ended, most likely. [`AgentError::NoSignal`]: nothing was sent.
    pub fn signal(&self, number: u8) -> Result<(), AgentError> {
        if !(1..=31).contains(&number) {
            return Err(AgentError::NoSignal(number));
        }
        self.outgoing.say(&ClientFrame::Signal(number))
    }

    /// Tells its terminal a new size.
    ///
    /// # Errors
    /// As [`Control::signal`].
    pub fn resize(&self, size: Size) -> Result<(), AgentError> {
        self.outgoing.say(&ClientFrame::Resize(size))
    }
}

impl Outgoing {
    fn say(&self, one: &ClientFrame) -> Result<(), AgentError> {
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        frame::write(&mut *stream, one).map_err(|error| AgentError::of_frame(error, None))
    }

    fn grow(&self, more: usize) {
        let mut input = self.input.lock().unwrap_or_else(PoisonError::into_inner);
        input.room += more;
        self.changed.notify_all();
    }

    /// Nobody wants input any more.
    fn end_input(&self) {
        let mut input = self.input.lock().unwrap_or_else(PoisonError::into_inner);
        input.over = true;
        self.changed.notify_all();
    }

    /// Takes up to `most` bytes of room, waits for the first; 0 once the program has ended.
    fn take(&self, most: usize) -> usize {
        let input = self.input.lock().unwrap_or_else(PoisonError::into_inner);
        let mut input = self
            .changed
            .wait_while(input, |input| input.room == 0 && !input.over)
            .unwrap_or_else(PoisonError::into_inner);
        if input.over {
            return 0;
        }
        let taken = most.min(input.room);
        input.room -= taken;
        taken
    }

    /// Sends all of `stdin`, as fast as the program reads it. A failure to send is the reader's to tell.
    fn feed(&self, mut stdin: Box<dyn Read + Send>) {
        let mut buffer = vec![0; STDIN_WINDOW as usize];
        loop {
            let mut rest = match stdin.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => &buffer[..count],
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::warn!("reading the input of a program in the guest: {error}");
                    break;
                }
            };
            while !rest.is_empty() {
                let (now, later) = rest.split_at(self.take(rest.len()));
                if now.is_empty() || self.say(&ClientFrame::Stdin(now.into())).is_err() {
                    return;
                }
                rest = later;
            }
        }
        self.end();
    }

    /// There is no more input. A program that has ended already does not mind: what it said is still to be read.
    fn end(&self) {
        if let Err(error) = self.say(&ClientFrame::StdinEnd) {
            tracing::debug!("ending the input of a program in the guest: {error}");
        }
    }
}
