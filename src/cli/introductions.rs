//! Machines that have forkvm's agent in them become themselves (`forkvm::linux::introduce`): each VM of a family with
//! vsocks once its agent answers, whoever started or forked it.
//!
//! A VM without a vsock, or without an agent, is left as it is. Where one VM's agent has answered, its family has
//! agents: a clone that does not take on its identity in time is ended, and told of.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use forkvm::agent::{AgentClient, AgentError};
use forkvm::engine::{Family, Member};
use forkvm::linux::{INTRODUCTION, Why, introduce, tell_parent};

/// How long an agent is waited for before it is looked whether the machine is still there.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// See the module's text.
#[derive(Clone)]
pub(super) struct Introductions {
    family: Arc<Family>,
    /// The agent of one of the family's VMs has answered.
    has_agents: Arc<AtomicBool>,
}

impl Introductions {
    /// `None` in a family without vsocks.
    pub(super) fn of(family: &Arc<Family>) -> Option<Introductions> {
        family.config().vsock.as_ref()?;
        Some(Introductions {
            family: family.clone(),
            has_agents: Arc::default(),
        })
    }

    /// A VM was started. It is waited for in a thread of its own.
    pub(super) fn hear_of(&self, member: &Arc<Member>) -> io::Result<()> {
        let (introductions, member) = (self.clone(), member.clone());
        thread::Builder::new()
            .name("introduce".into())
            .spawn(move || introductions.meet(&member))?;
        Ok(())
    }

    /// The host has forked a VM. Its agent, if it has one, is told in a thread of its own.
    pub(super) fn hear_of_fork(&self, parent: &Arc<Member>) -> io::Result<()> {
        if !self.has_agents.load(Ordering::Acquire) {
            return Ok(());
        }
        let Some(spec) = &self.family.config().vsock else {
            return Ok(());
        };
        let agent = AgentClient::at(&spec.path_of(&parent.identity()));
        let parent = parent.clone();
        let tell = move || tell_parent(&parent, &agent, INTRODUCTION);
        thread::Builder::new().name("forked".into()).spawn(tell)?;
        Ok(())
    }

    fn meet(&self, member: &Arc<Member>) {
        if !self.has_agents.load(Ordering::Acquire) && !self.wait_for_agent(member) {
            return;
        }
        if let Err(error) = introduce(&self.family, member, INTRODUCTION)
            // Its end is told of as any is.
            && !matches!(error.why, Why::Ended(_))
        {
            super::errors::report(&error.into());
        }
    }

    /// Waits until it is known that the family has agents, or that `member` has none; whether it has.
    fn wait_for_agent(&self, member: &Member) -> bool {
        let Some(spec) = &self.family.config().vsock else {
            return false;
        };
        let socket = spec.path_of(&member.identity());
        while member.wait_for(Duration::ZERO).is_none() {
            match AgentClient::connect(&socket, Instant::now() + LOOK_EVERY) {
                Ok(_) => {
                    self.has_agents.store(true, Ordering::Release);
                    return true;
                }
                Err(AgentError::NotYet { .. }) if self.has_agents.load(Ordering::Acquire) => {
                    return true;
                }
                Err(AgentError::NotYet { .. }) => {}
                Err(error) => {
                    let vm = member.name();
                    tracing::warn!(%error, vm, "it and its clones will not be told who they are");
                    return false;
                }
            }
        }
        false
    }
}
