//! A connection that has become the console of a VM: what it prints goes to the client, what the client types
//! goes to it, until either ends.
//!
//! One thread does both. It waits for the client, for a bell that rings when the VM prints or ends, and, while
//! the guest's UART is full, for a moment.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use forkvm::engine::Member;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::bell::Bell;
use super::lines::Lines;
use super::protocol::{self, Bytes, CONSOLE_CHUNK, Failure, Kind, Shown, Typed};
use super::registry::Found;
use super::server::Machine;
use super::taps::{Heard, Listener};

/// How long to wait when the guest's UART is full.
const FULL_PAUSE: Duration = Duration::from_millis(20);

/// A console that a client is to have.
pub(super) struct Console<'a> {
    machine: &'a Machine,
    member: Arc<Member>,
    listener: Arc<Listener>,
    bell: Arc<Bell>,
}

/// What the client has typed and the guest has not taken.
#[derive(Default)]
struct Input {
    pending: Vec<u8>,
    /// The client types no more.
    over: bool,
}

/// That of the VM `name`, from now on.
pub(super) fn open<'a>(
    machine: &'a Machine,
    name: &str,
) -> io::Result<Result<Console<'a>, Failure>> {
    let bell = Arc::new(Bell::new()?);
    let member = match machine.vms.watch(name, &bell) {
        Ok(Found::Running(member)) => member,
        Ok(Found::Ended(ending)) => return Ok(Err(Failure::ended(name, &ending.end))),
        Err(failure) => return Ok(Err(failure)),
    };
    let Some(listener) = machine.taps.listen(name, &bell) else {
        let text = format!("VM {name} is just ending");
        return Ok(Err(Failure::new(Kind::State, text)));
    };
    Ok(Ok(Console {
        machine,
        member,
        listener,
        bell,
    }))
}

impl Console<'_> {
    pub(super) fn serve(self, mut lines: Lines) -> io::Result<()> {
        let mut input = Input::default();
        loop {
            // In this order: what rings later wakes it, and all that the VM printed is there before its end.
            self.bell.silence();
            let ending = self.machine.vms.ending(self.member.name());
            self.show(&mut lines)?;
            if let Some(ending) = ending {
                return send(&mut lines, &Shown::Ended(ending));
            }
            if let Err(failure) = input.pass(&mut lines, &self.member) {
                return send(&mut lines, &Shown::Error(failure));
            }
            if !self.wait(&mut lines, &mut input)? {
                return Ok(());
            }
        }
    }

    /// Sends what was printed.
    fn show(&self, lines: &mut Lines) -> io::Result<()> {
        let Heard { bytes, lost } = self.listener.take();
        for chunk in bytes.chunks(CONSOLE_CHUNK) {
            send(lines, &Shown::Printed(Bytes(chunk.to_vec())))?;
        }
        if lost > 0 {
            send(lines, &Shown::Lost(lost))?;
        }
        Ok(())
    }

    /// Waits until there is something to do; `false` when the client has hung up.
    fn wait(&self, lines: &mut Lines, input: &mut Input) -> io::Result<bool> {
        let more = input.pending.is_empty() && !input.over;
        let readable = if more {
            PollFlags::IN
        } else {
            PollFlags::empty()
        };
        let pause = Timespec::try_from(FULL_PAUSE).map_err(io::Error::other)?;
        let pause = (!input.pending.is_empty()).then_some(&pause);
        let client = {
            let mut fds = [
                PollFd::new(lines.stream(), readable),
                PollFd::new(&*self.bell, PollFlags::IN),
            ];
            match poll(&mut fds, pause) {
                Ok(_) | Err(Errno::INTR) => fds[0].revents(),
                Err(error) => return Err(error.into()),
            }
        };
        if client.contains(PollFlags::IN) {
            input.over = !lines.fill().map_err(io::Error::other)?;
            // It may have hung up behind what it wrote, which counts.
            return Ok(true);
        }
        Ok(!client.intersects(PollFlags::HUP | PollFlags::ERR))
    }
}

impl Input {
    /// Passes on what has been read, as far as the guest has room for it.
    fn pass(&mut self, lines: &mut Lines, member: &Member) -> Result<(), Failure> {
        loop {
            self.give_to(member);
            if !self.pending.is_empty() {
                return Ok(());
            }
            let line = lines.take();
            let Some(line) = line.map_err(|error| Failure::usage(error.to_string()))? else {
                return Ok(());
            };
            let Typed::Input(Bytes(bytes)) = protocol::from_line(&line)?;
            self.pending = bytes;
        }
    }

    fn give_to(&mut self, member: &Member) {
        if self.pending.is_empty() {
            return;
        }
        match member.console_input(&self.pending) {
            Ok(taken) => drop(self.pending.drain(..taken)),
            // That comes by the bell.
            Err(_ended) => self.pending.clear(),
        }
    }
}

fn send(lines: &mut Lines, shown: &Shown) -> io::Result<()> {
    lines.send(&protocol::to_line(shown)?)
}
