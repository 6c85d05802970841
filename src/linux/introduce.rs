//! Tells a machine who it is, and ends one that does not come to know.

use std::fs::File;
use std::io::{self, Read};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use forkvm_clone_engine::{Family, Identity, Member};
use thiserror::Error;

use crate::agent::protocol::{self, Generation, Identified};
use crate::agent::{AgentClient, AgentError};

/// Bytes of entropy for a machine's kernel: as many as its pool holds (Linux 5.18).
const ENTROPY: usize = 64;

/// Longest host name of Linux.
const HOSTNAME: usize = 64;

/// How long an agent is waited for before it is looked how its machine is.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// Between two tries.
const PAUSE: Duration = Duration::from_millis(20);

/// A machine that has become itself.
#[derive(Clone)]
pub struct Introduced {
    /// Its agent.
    pub agent: AgentClient,
    /// What the agent answered.
    pub identified: Identified,
    /// When it did.
    pub at: Instant,
}

/// Waits until the agent of `member` has taken on the identity of `member`: host name, machine-id, random
/// numbers, clock, and what the hooks of its guest do. `member` is ended where that does not come to be within
/// `patience`, and the error says why. Time in which it is paused does not count.
pub fn introduce(
    family: &Family,
    member: &Arc<Member>,
    patience: Duration,
) -> Result<Introduced, IntroduceError> {
    let introduced = try_introduce(family, member, patience);
    introduced.map_err(|why| {
        if !matches!(why, Why::Ended(_)) {
            member.kill();
        }
        IntroduceError {
            name: member.name().to_owned(),
            why,
        }
    })
}

fn try_introduce(
    family: &Family,
    member: &Arc<Member>,
    patience: Duration,
) -> Result<Introduced, Why> {
    let vm = member.identity();
    let spec = family.config().vsock.as_ref().ok_or(Why::NoVsock)?;
    let socket = spec.path_of(&vm);
    // The same each time that it is tried: an agent that has it already says so.
    let mut identity = identity_of(&vm).map_err(Why::Entropy)?;
    let mut left = patience;
    loop {
        let began = Instant::now();
        let introduced =
            AgentClient::connect(&socket, began + left.min(LOOK_EVERY)).and_then(|agent| {
                identity.wall_clock = wall_clock();
                let identified = agent.identify(&identity, began + left)?;
                Ok((agent, identified))
            });
        // What it ended with says more than that nobody answers.
        if let Some(finished) = member.wait_for(Duration::ZERO) {
            return Err(Why::Ended(finished.end.to_string()));
        }
        if !member.is_paused() {
            left = left.saturating_sub(began.elapsed());
        }
        match introduced {
            Ok((agent, identified)) => {
                return Ok(Introduced {
                    agent,
                    identified,
                    at: Instant::now(),
                });
            }
            // A stream breaks also because a clone's driver ends what it has when it hears of the fork, even if
            // it was opened since (docs/vsock.md).
            Err(error) if error.may_pass() && !left.is_zero() => thread::sleep(PAUSE),
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

/// The VM's name with dashes for its dots: a dot would begin a domain. Of one that is too long the end is kept, which
/// tells clones apart.
fn hostname_of(name: &str) -> String {
    let plain = |letter: char| match letter {
        letter if letter.is_ascii_alphanumeric() => letter,
        _ => '-',
    };
    let plain: String = name.chars().map(plain).collect();
    plain[plain.len().saturating_sub(HOSTNAME)..]
        .trim_start_matches('-')
        .to_owned()
}

/// Nanoseconds since 1970.
fn wall_clock() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_nanos() as u64)
}

/// A machine did not become itself, and has ended.
#[derive(Debug, Error)]
#[error("{name} did not become itself")]
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
    #[error("its agent did not take on its identity, and it was ended")]
    Agent(#[from] AgentError),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_name_is_the_name_of_the_vm_without_what_ends_a_host_name() {
        assert_eq!(hostname_of("web.1.2"), "web-1-2");
        let long = "x".repeat(80);
        assert_eq!(hostname_of(&long).len(), HOSTNAME);
        let names = [format!("{long}.1"), format!("{long}.2")];
        assert_ne!(hostname_of(&names[0]), hostname_of(&names[1]));
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
