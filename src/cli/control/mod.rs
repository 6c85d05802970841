//! The control socket of a machine that was started with a name: `docs/control-socket.md`.
//!
//! A process that runs a family claims the name's directory ([`place`]) and listens there ([`server`]); what
//! is spoken is in [`protocol`], what each request does in [`requests`] and, for a console, [`stream`]. The
//! server looks VMs up in a [`registry`], which the session fills. Commands that hold on to a machine are
//! [`client`]s; they are in `super::machines`. Nothing here starts or ends a VM by itself.

mod bell;
pub(super) mod client;
mod failure;
mod lines;
pub(super) mod place;
pub(super) mod protocol;
pub(super) mod registry;
mod requests;
mod server;
mod stream;
pub(super) mod taps;

pub(super) use server::{Machine, Server};
