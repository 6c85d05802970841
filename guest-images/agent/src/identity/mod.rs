//! Who this machine is: taken on step by step, and only as a whole.
//!
//! The steps are those of [`System`], in their order. The first that fails fails the identification, and the host ends such
//! a machine: one that has half an identity must not go on. A generation that was taken on is not taken on twice.

mod hooks;
mod linux;
mod machine_id;
mod random;

use std::io;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use forkvm_agent_protocol::{ENTROPY_MIN, Generation, Identified, Identity, StepTook};
use thiserror::Error;

pub use hooks::HookError;
pub use linux::{LinuxSystem, clock_source};

/// What an identity changes in a machine. Tests have one of their own.
pub trait System: Send + Sync {
    /// Waits until the driver of the machine's vsock knows its address, `cid`; 0 is none. What was connected
    /// before ends at that moment, in a clone or a machine that was restored.
    ///
    /// # Errors
    /// It does not come to know it.
    fn wait_for_address(&self, cid: u64) -> io::Result<()>;
    /// The name of the machine.
    ///
    /// # Errors
    /// The kernel's.
    fn set_hostname(&self, name: &str) -> io::Result<()>;
    /// `/etc/machine-id`.
    ///
    /// # Errors
    /// It can be neither written nor covered.
    fn set_machine_id(&self, id: &str) -> io::Result<()>;
    /// The kernel's random numbers: from here on no other machine has the same.
    ///
    /// # Errors
    /// The kernel's.
    fn reseed(&self, entropy: &[u8]) -> io::Result<()>;
    /// The time of day, nanoseconds since 1970.
    ///
    /// # Errors
    /// The kernel's.
    fn set_wall_clock(&self, nanoseconds: u64) -> io::Result<()>;
    /// What only the applications know. Names of the hooks that ran.
    ///
    /// # Errors
    /// The first hook that failed or took too long.
    fn run_hooks(&self, role: Role, generation: Generation) -> Result<Vec<String>, HookError>;
    /// What the kernel tells time by.
    fn clock_source(&self) -> String;
}

/// What a machine is after a fork.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It goes on as who it was. So does one that was booted or restored.
    Parent,
    /// A clone of this number.
    Clone(u32),
}

impl Role {
    fn of(clone_id: u32) -> Role {
        match clone_id {
            0 => Role::Parent,
            number => Role::Clone(number),
        }
    }
}

/// An identity that was taken on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Known {
    /// What no other machine has.
    pub generation: Generation,
    /// 0 in a parent.
    pub clone_id: u32,
}

/// The identities of this machine, one after the other.
pub struct Identities {
    system: Box<dyn System>,
    /// Held while an identity is taken on: two hosts cannot mix theirs.
    last: Mutex<Option<(Known, Identified)>>,
    /// As `last`; seen by those who must not wait for an identity that is being taken on.
    known: Mutex<Option<Known>>,
    changed: Condvar,
}

impl Identities {
    /// None yet.
    pub fn new(system: Box<dyn System>) -> Identities {
        Identities {
            system,
            last: Mutex::new(None),
            known: Mutex::new(None),
            changed: Condvar::new(),
        }
    }

    /// Takes an identity on. One that it has is acknowledged, and nothing is done.
    ///
    /// # Errors
    /// The step that failed. Steps before it are not undone.
    pub fn identify(&self, identity: &Identity) -> Result<Identified, IdentifyError> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((known, identified)) = &*last
            && known.generation == identity.generation
        {
            return Ok(identified.clone());
        }
        check(identity)?;
        let system = &self.system;
        let mut steps = Steps::begin();
        // First: whoever asked, and hears no answer for it, asks again and finds all of it done.
        let done = system.wait_for_address(identity.cid);
        steps.end("vsock-address", "learn its vsock address", done)?;
        let done = system.set_hostname(&identity.hostname);
        steps.end("hostname", "set the hostname", done)?;
        let done = system.set_machine_id(&identity.machine_id);
        steps.end("machine-id", "write /etc/machine-id", done)?;
        let done = system.reseed(&identity.entropy.0);
        steps.end("entropy", "reseed the kernel's random numbers", done)?;
        let done = system.set_wall_clock(identity.wall_clock);
        steps.end("clock", "set the clock", done)?;
        let hooks = system.run_hooks(Role::of(identity.clone_id), identity.generation)?;
        steps.end("hooks", "run its hooks", Ok(()))?;
        let identified = Identified {
            generation: identity.generation,
            hooks,
            clock_source: system.clock_source(),
            steps: steps.took,
        };
        let known = Known {
            generation: identity.generation,
            clone_id: identity.clone_id,
        };
        *last = Some((known, identified.clone()));
        *self.known.lock().unwrap_or_else(PoisonError::into_inner) = Some(known);
        self.changed.notify_all();
        Ok(identified)
    }

    /// Runs the hooks of a machine that has just forked and is the parent. Names of those that ran.
    ///
    /// # Errors
    /// The first hook that failed or took too long.
    pub fn after_fork(&self) -> Result<Vec<String>, HookError> {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        // Zeros in a machine that was never told who it is.
        let generation = match &*last {
            Some((known, _)) => known.generation,
            None => Generation([0; 16]),
        };
        self.system.run_hooks(Role::Parent, generation)
    }

    /// The last one that was taken on.
    pub fn current(&self) -> Option<Known> {
        *self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `generation` is taken on.
    ///
    /// # Errors
    /// It is not within `limit`.
    pub fn wait_for(&self, generation: Generation, limit: Duration) -> Result<(), IdentifyError> {
        let deadline = Instant::now() + limit;
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        while known.map(|known| known.generation) != Some(generation) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(IdentifyError::NotIdentified {
                    generation,
                    seconds: limit.as_secs(),
                });
            }
            known = self
                .changed
                .wait_timeout(known, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        Ok(())
    }
}

/// Steps of an identification, and what each took.
struct Steps {
    last: Instant,
    took: Vec<StepTook>,
}

impl Steps {
    fn begin() -> Steps {
        Steps {
            last: Instant::now(),
            took: Vec::new(),
        }
    }

    /// The step `name` is over. `what` says in an error what could not be done.
    fn end(
        &mut self,
        name: &str,
        what: &'static str,
        done: io::Result<()>,
    ) -> Result<(), IdentifyError> {
        done.map_err(|source| IdentifyError::Step { step: what, source })?;
        let now = Instant::now();
        self.took.push(StepTook {
            step: name.into(),
            us: now.duration_since(self.last).as_micros() as u64,
        });
        self.last = now;
        Ok(())
    }
}

/// What can be seen before anything is changed.
fn check(identity: &Identity) -> Result<(), IdentifyError> {
    let name = &identity.hostname;
    if name.is_empty() || name.len() > 64 || name.contains(['\0', '\n']) {
        return Err(IdentifyError::Hostname(name.clone()));
    }
    let id = &identity.machine_id;
    let digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    if id.len() != 32 || !id.bytes().all(digit) {
        return Err(IdentifyError::MachineId(id.clone()));
    }
    let bytes = identity.entropy.0.len();
    if bytes < ENTROPY_MIN {
        return Err(IdentifyError::Entropy(bytes));
    }
    Ok(())
}

/// Why a machine is not who it should be.
#[derive(Debug, Error)]
pub enum IdentifyError {
    /// Out of its range; nothing was changed.
    #[error("{0:?} is no hostname: 1 to 64 bytes are")]
    Hostname(String),
    /// Out of its range; nothing was changed.
    #[error("{0:?} is no machine id: 32 hexadecimal digits in lower case are")]
    MachineId(String),
    /// Too few; nothing was changed.
    #[error("{0} bytes of entropy, where {ENTROPY_MIN} are wanted")]
    Entropy(usize),
    /// A step failed.
    #[error("this machine could not {step}, so it must not go on as another one")]
    Step {
        /// What was tried.
        step: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// A hook failed.
    #[error(transparent)]
    Hook(#[from] HookError),
    /// A clone that nobody has spoken to.
    #[error(
        "this clone was not identified as {generation} within {seconds} s: its host has to, before anything goes on in it"
    )]
    NotIdentified {
        /// Whom the doorbell says that it is.
        generation: Generation,
        /// How long it waited.
        seconds: u64,
    },
}

impl IdentifyError {
    /// Linux's number for it.
    pub(crate) fn errno(&self) -> i32 {
        match self {
            IdentifyError::Hostname(_)
            | IdentifyError::MachineId(_)
            | IdentifyError::Entropy(_) => libc::EINVAL,
            IdentifyError::Step { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
            IdentifyError::Hook(_) => libc::EIO,
            IdentifyError::NotIdentified { .. } => libc::ETIMEDOUT,
        }
    }
}

#[cfg(test)]
mod tests;
