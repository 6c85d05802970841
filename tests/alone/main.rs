//! What a process holds before and after forks: descriptors, threads, mappings, memory, files.
//!
//! Each test needs the process for itself ([`alone`]).

#[path = "../common/mod.rs"]
mod common;

mod census;
mod leaks;
mod rollback;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Held by the test that counts what the process holds. Under nextest each test has a process;
/// under `cargo test` they take turns.
fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}
