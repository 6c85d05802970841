//! Machines that have forkvm's agent in them become themselves (`forkvm::linux::introduce`): the VM that was
//! started once its agent answers, and from then on each of its clones, whoever forked it.
//!
//! A VM without a vsock, or without an agent, is left as it is. One whose agent has answered is not: a clone that does
//! not take on its identity in time is ended, and told of.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use forkvm::agent::{AgentClient, AgentError};
use forkvm::engine::{Family, Member};
use forkvm::linux::{INTRODUCTION, introduce};

/// How long an agent is waited for before it is looked whether the machine is still there.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// See the module's text.
pub(super) struct Introductions {
    family: Arc<Family>,
    /// The agent of the VM that was started has answered.
    has_agent: Arc<AtomicBool>,
}

impl Introductions {
    /// Waits for the agent of `root` in a thread of its own. `None` in a family without vsocks.
    pub(super) fn begin(
        family: &Arc<Family>,
        root: &Arc<Member>,
    ) -> io::Result<Option<Introductions>> {
        let Some(spec) = &family.config().vsock else {
            return Ok(None);
        };
        let has_agent = Arc::new(AtomicBool::new(false));
        let (socket, seen) = (spec.path_of(&root.identity()), has_agent.clone());
        let (family, root) = (family.clone(), root.clone());
        let introductions = Introductions {
            family: family.clone(),
            has_agent,
        };
        let meet = move || {
            while root.wait_for(Duration::ZERO).is_none() {
                match AgentClient::connect(&socket, Instant::now() + LOOK_EVERY) {
                    Ok(_) => {
                        seen.store(true, Ordering::Release);
                        return tell(&family, &root);
                    }
                    Err(AgentError::NotYet { .. }) => {}
                    Err(error) => {
                        return tracing::warn!(%error, "clones will not be told who they are");
                    }
                }
            }
        };
        thread::Builder::new()
            .name("introduce".into())
            .spawn(meet)?;
        Ok(Some(introductions))
    }

    /// A clone was started.
    pub(super) fn hear_of(&self, clone: &Arc<Member>) {
        if !self.has_agent.load(Ordering::Acquire) {
            return tracing::debug!(clone = clone.name(), "forked before its agent answered");
        }
        let (family, member) = (self.family.clone(), clone.clone());
        let spawned = thread::Builder::new()
            .name("introduce".into())
            .spawn(move || tell(&family, &member));
        if let Err(error) = spawned {
            tracing::error!(%error, clone = clone.name(), "no thread to tell a clone who it is: it is ended");
            clone.kill();
        }
    }
}

fn tell(family: &Family, member: &Arc<Member>) {
    if let Err(error) = introduce(family, member, Instant::now() + INTRODUCTION) {
        super::errors::report(&error.into());
    }
}
