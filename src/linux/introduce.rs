//! Tells a machine who it is, and ends one that does not come to know.

use std::fs::File;
use std::io::{self, Read};
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use forkvm_clone_engine::{Family, Identity, Member};
use thiserror::Error;

use crate::agent::protocol::{self, Generation};
use crate::agent::{AgentClient, AgentError};

/// Bytes of entropy for a machine's kernel: as many as its pool holds (Linux 5.18).
const ENTROPY: usize = 64;

/// Longest host name of Linux.
const HOSTNAME: usize = 64;

/// Waits until the agent of `member` has taken on the identity of `member`: host name, machine-id, random
/// numbers, clock, and what the hooks of its guest do. `member` is ended where that does not come to be until
/// `deadline`, and the error says why.
pub fn introduce(
    family: &Family,
    member: &Arc<Member>,
    deadline: Instant,
) -> Result<AgentClient, IntroduceError> {
    let introduced = try_introduce(family, member, deadline);
    if introduced.is_err() {
        member.kill();
    }
    introduced.map_err(|why| IntroduceError {
        name: member.name().to_owned(),
        why,
    })
}

fn try_introduce(
    family: &Family,
    member: &Arc<Member>,
    deadline: Instant,
) -> Result<AgentClient, Why> {
    let vm = member.identity();
    let spec = family.config().vsock.as_ref().ok_or(Why::NoVsock)?;
    let socket = spec.path_of(&vm);
    // The same each time that it is tried: an agent that has it already says so.
    let mut identity = identity_of(&vm).map_err(Why::Entropy)?;
    loop {
        if let Some(finished) = member.wait_for(std::time::Duration::ZERO) {
            return Err(Why::Ended(finished.end.to_string()));
        }
        let agent = match AgentClient::connect(&socket, deadline) {
            Ok(agent) => agent,
            // What it ended with says more than that nobody answers.
            Err(_) if member.wait_for(std::time::Duration::ZERO).is_some() => continue,
            Err(error) => return Err(error.into()),
        };
        identity.wall_clock = wall_clock();
        match agent.identify(&identity, deadline) {
            Ok(_) => return Ok(agent),
            Err(error @ (AgentError::Refused(_) | AgentError::Stranger(_))) => {
                return Err(error.into());
            }
            // A clone's driver ends what it has when it hears of the fork, also a stream that was opened
            // since (docs/vsock.md).
            Err(_) if Instant::now() < deadline => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn identity_of(vm: &Identity) -> io::Result<protocol::Identity> {
    let mut random = [0; 16 + ENTROPY];
    File::open("/dev/urandom")?.read_exact(&mut random)?;
    let (machine_id, entropy) = random.split_at(16);
    Ok(protocol::Identity {
        clone_id: vm.clone_id,
        generation: Generation(vm.generation),
        hostname: hostname_of(&vm.name),
        machine_id: machine_id
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect(),
        entropy: entropy.into(),
        wall_clock: wall_clock(),
        cid: vm.cid.map_or(0, u64::from),
    })
}

/// The VM's name with dashes for its dots: a dot would begin a domain.
fn hostname_of(name: &str) -> String {
    let plain = |letter: char| match letter {
        letter if letter.is_ascii_alphanumeric() => letter,
        _ => '-',
    };
    name.chars().map(plain).take(HOSTNAME).collect()
}

/// Nanoseconds since 1970.
fn wall_clock() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_nanos() as u64)
}

/// A machine did not become itself, and was ended.
#[derive(Debug, Error)]
#[error("{name} was ended: its agent did not take on its identity")]
pub struct IntroduceError {
    /// Its name.
    pub name: String,
    /// What was wrong.
    #[source]
    pub why: Why,
}

/// What was wrong.
#[derive(Debug, Error)]
pub enum Why {
    /// There is no way to the agent.
    #[error("it has no vsock: give the family one (`--vsock`)")]
    NoVsock,
    /// No random bytes.
    #[error("reading random bytes for it failed")]
    Entropy(#[source] io::Error),
    /// It was over before.
    #[error("the machine {0}")]
    Ended(String),
    /// The agent failed, or never answered.
    #[error(transparent)]
    Agent(#[from] AgentError),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_name_is_the_name_of_the_vm_without_what_ends_a_host_name() {
        assert_eq!(hostname_of("web.1.2"), "web-1-2");
        assert_eq!(hostname_of(&"x".repeat(80)).len(), HOSTNAME);
    }

    #[test]
    fn two_machines_never_have_the_same_machine_id_or_entropy() {
        let vm = Identity::root("vm").unwrap();
        let (one, other) = (identity_of(&vm).unwrap(), identity_of(&vm).unwrap());
        assert_eq!(one.machine_id.len(), 32);
        assert_ne!(one.machine_id, other.machine_id);
        assert_ne!(one.entropy, other.entropy);
    }
}
