//! Tells a machine that the host has forked it.

use std::thread;
use std::time::{Duration, Instant};

use forkvm_clone_engine::Member;

use crate::agent::{AgentClient, AgentError};

/// Between two tries.
const PAUSE: Duration = Duration::from_millis(20);

/// Has the hooks of `parent` run, through its `agent`, after a fork that the host asked for; where a program of the guest did, the
/// agent knows. One that fails, or is not told within `patience`, is warned of: the fork is made, and the parent is who it was. Time
/// in which it is paused does not count.
pub fn tell_parent(parent: &Member, agent: &AgentClient, patience: Duration) {
    let vm = parent.name();
    match until_told(parent, agent, patience) {
        Ok(ran) => tracing::debug!(vm, ?ran, "the parent's hooks have run"),
        Err(_) if has_ended(parent) => {}
        Err(error) => {
            tracing::warn!(%error, vm, "the hooks of a machine that was forked did not all run");
        }
    }
}

fn until_told(
    parent: &Member,
    agent: &AgentClient,
    mut left: Duration,
) -> Result<Vec<String>, AgentError> {
    loop {
        while parent.is_paused() && !has_ended(parent) {
            thread::sleep(PAUSE);
        }
        let began = Instant::now();
        // A socket takes no limit of nothing.
        let limit = left.max(Duration::from_millis(1));
        let told = agent.clone().with_limit(limit).after_fork();
        if !parent.is_paused() {
            left = left.saturating_sub(began.elapsed());
        }
        match told {
            Err(error) if error.may_pass() && !left.is_zero() && !has_ended(parent) => {
                thread::sleep(PAUSE);
            }
            told => return told,
        }
    }
}

fn has_ended(parent: &Member) -> bool {
    parent.wait_for(Duration::ZERO).is_some()
}
