//! A fork that a client asks for, and what it may ask afterwards on the same stream.
//!
//! A program of the guest has its stream in every machine of the fork and is answered in each: in the parent when its hooks
//! have run, in a clone when the host has identified it, since the program goes on with what it is told. The host's own streams
//! end in clones. The right to join, or to end a clone, is that of the stream which forked.

use std::time::Duration;

use forkvm_agent_protocol::{AgentFrame, ClientFrame, Forked, FrameError, Refusal, frame};

use crate::agent::{Agent, Last};
use crate::outbox::Outbox;
use crate::refusal::of_error;
use crate::session::{Inbox, Peer, out_of_turn};

/// How long a clone waits for its identity before the fork counts as failed there.
pub(crate) const IDENTITY_LIMIT: Duration = Duration::from_secs(60);

/// Forks, answers, and serves what comes then. A clone that nobody identifies within `limit` is ended: it would go on as its
/// parent's double.
pub(crate) fn serve(
    agent: &Agent,
    peer: Peer,
    clones: u32,
    inbox: &mut Inbox,
    outbox: &Outbox,
    limit: Duration,
) -> Result<(), Refusal> {
    let fork = agent
        .doorbell()
        .fork(clones)
        .map_err(|error| of_error(error.errno(), &error))?;
    // From here on in each machine.
    let is_clone = fork.clone_id != 0;
    if is_clone && peer == Peer::Host {
        return Ok(());
    }
    if is_clone && let Err(error) = agent.identities().wait_for(fork.generation, limit) {
        crate::log::line(&format!("{error}; it ends, where the agent can end it"));
        end(agent, 1);
        return Err(of_error(error.errno(), &error));
    }
    if !is_clone && let Err(error) = agent.identities().after_fork() {
        // The fork is made, and the parent is who it was.
        crate::log::line(&error.to_string());
    }
    outbox.send_if_heard(&AgentFrame::Forked(Forked {
        clone_id: fork.clone_id,
        granted: fork.granted,
        generation: fork.generation,
    }));
    match frame::read(inbox) {
        // Most ask for no more, and the host's streams may end by a reset.
        Ok(None) | Err(FrameError::Stream(_) | FrameError::Cut) => Ok(()),
        Ok(Some(ClientFrame::Join)) if !is_clone => {
            let status = agent
                .doorbell()
                .join(fork.ticket)
                .map_err(|error| of_error(error.errno(), &error))?;
            outbox.send_if_heard(&AgentFrame::Joined { status });
            Ok(())
        }
        Ok(Some(ClientFrame::End(status))) if is_clone => {
            end(agent, status);
            Ok(())
        }
        Ok(Some(other)) => Err(out_of_turn(&other)),
        Err(error) => Err(of_error(libc::EPROTO, &error)),
    }
}

/// Ends this machine: in order where the agent is PID 1, else with what is on the disks now.
fn end(agent: &Agent, status: u8) {
    if !agent.end_machine(Last::Exit(status)) {
        rustix::fs::sync();
        agent.doorbell().exit(status);
    }
}

#[cfg(test)]
mod tests;
