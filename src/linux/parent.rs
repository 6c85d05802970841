//! Tells a machine that the host has forked it.

use forkvm_clone_engine::Member;

use crate::agent::AgentClient;

/// Has the hooks of `parent` run, through its `agent`, after a fork that the host asked for; where a program of the guest did, the
/// agent knows. A hook that fails is warned of: the fork is made, and the parent is who it was.
pub fn tell_parent(parent: &Member, agent: &AgentClient) {
    let vm = parent.name();
    match agent.after_fork() {
        Ok(ran) => tracing::debug!(vm, ?ran, "the parent's hooks have run"),
        Err(error) => {
            tracing::warn!(%error, vm, "the hooks of a machine that was forked did not all run")
        }
    }
}
