//! What the client of a running program sends: input, signals, sizes, and its going away.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::Sender;

use forkvm_agent_protocol::{AgentFrame, Bytes, ClientFrame, Refusal, frame};
use rustix::process::Signal;

use super::terminal::Terminal;
use crate::agent::Agent;
use crate::doorbell::Who;
use crate::outbox::Outbox;
use crate::reaper::Child;
use crate::refusal::{invalid, of_error};
use crate::session::{Inbox, out_of_turn};

/// For the standard input.
pub(super) enum Input {
    Bytes(Vec<u8>),
    End,
}

/// The client's half of a running program.
pub(super) struct Client<'a> {
    pub(super) child: &'a Child,
    pub(super) terminal: Option<&'a Terminal>,
    /// Bytes that the client may still send.
    pub(super) room: &'a AtomicUsize,
    /// Who the machine was when the program was started.
    pub(super) born_as: Option<Who>,
}

impl Client<'_> {
    /// Reads to the end of the stream. A client that goes away, or breaks the rules, ends the program.
    pub(super) fn listen(
        &self,
        agent: &Agent,
        mut inbox: Inbox,
        outbox: &Outbox,
        to_input: Sender<Input>,
    ) {
        let refusal = loop {
            match frame::read::<ClientFrame>(&mut inbox) {
                Ok(Some(frame)) => {
                    if let Err(refusal) = self.obey(frame, outbox, &to_input) {
                        break Some(refusal);
                    }
                }
                // A reset is a client that died, or this machine is a clone.
                Ok(None) | Err(forkvm_agent_protocol::FrameError::Stream(_)) => break None,
                Err(error) => break Some(of_error(libc::EPROTO, &error)),
            }
        };
        if self.child.ended().has() {
            return;
        }
        if let Some(refusal) = refusal {
            outbox.send_if_heard(&AgentFrame::Refused(refusal));
            outbox.close();
            self.child.hang_up();
        } else if agent.doorbell().who().map(|who| who.generation)
            == self.born_as.map(|who| who.generation)
        {
            self.child.hang_up();
        }
        // Else: the client is the parent's and did not come along. The program is this clone's own now, as after a fork().
    }

    fn obey(
        &self,
        frame: ClientFrame,
        outbox: &Outbox,
        to_input: &Sender<Input>,
    ) -> Result<(), Refusal> {
        match frame {
            ClientFrame::Stdin(Bytes(bytes)) => {
                let taken = self
                    .room
                    .fetch_update(Ordering::AcqRel, Ordering::Acquire, |room| {
                        room.checked_sub(bytes.len())
                    });
                if taken.is_err() {
                    return Err(invalid("the client sent more input than there is room for"));
                }
                // Whoever feeds the input ends with the program; then nobody wants it.
                to_input.send(Input::Bytes(bytes)).unwrap_or_default();
            }
            ClientFrame::StdinEnd => to_input.send(Input::End).unwrap_or_default(),
            ClientFrame::Signal(number) => match Signal::from_named_raw(number.into()) {
                Some(signal) => self.child.signal(signal),
                // Not worth a program's life.
                None => outbox.send_if_heard(&AgentFrame::Refused(invalid(format!(
                    "there is no signal {number}: 1 to 31 can be sent"
                )))),
            },
            ClientFrame::Resize(size) => {
                // Without a terminal there is nothing to resize: no harm either.
                if let Some(terminal) = self.terminal
                    && let Err(error) = terminal.resize(size)
                {
                    crate::log::line(&format!("resizing a terminal: {error}"));
                }
            }
            other => return Err(out_of_turn(&other)),
        }
        Ok(())
    }
}
