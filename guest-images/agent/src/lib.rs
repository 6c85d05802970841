//! forkvm's agent, in the guest.
//!
//! It serves the host over vsock and programs of the guest over a Unix socket: commands, files, identity,
//! health and forks, one session each ([`session`]). docs/agent.md says what is said. As PID 1 it
//! also makes the system and ends the machine ([`init`]). Called as `forkvm-guest` it is the
//! other end of its own Unix socket ([`inside`]).
//!
//! Threads and blocking calls, no runtime: a session costs two to five threads while it lasts. What
//! touches ports, raw memory or a child between fork and exec is `unsafe`, in modules that
//! allow it and say why.

pub mod agent;
pub mod doorbell;
pub(crate) mod exec;
mod files;
mod forks;
pub mod identity;
pub mod init;
pub mod inside;
pub mod listen;
pub mod log;
pub mod options;
mod outbox;
mod reaper;
mod refusal;
pub mod session;
mod vsock;
