//! SIGINT and SIGTERM for commands that take long: the first asks for the end, a second ends the process at
//! once.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use super::errors;
use super::output::Outcome;

/// What was heard.
pub(super) struct Stop {
    asked: Arc<AtomicBool>,
    signal: Arc<AtomicUsize>,
}

impl Stop {
    /// Hears signals from now on.
    pub(super) fn on_signals() -> io::Result<Stop> {
        let (asked, number) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicUsize::new(0)),
        );
        for signal in [SIGINT, SIGTERM] {
            // In this order: the handler of the second signal finds what the first one has set.
            flag::register_conditional_shutdown(signal, 128 + signal, asked.clone())?;
            flag::register_usize(signal, number.clone(), signal as usize)?;
            flag::register(signal, asked.clone())?;
        }
        Ok(Stop {
            asked,
            signal: number,
        })
    }

    /// Set once the end is asked for.
    pub(super) fn asked(&self) -> Arc<AtomicBool> {
        self.asked.clone()
    }

    /// What a command came to that failed with `error`: where it was asked to end, that is why.
    pub(super) fn outcome(&self, error: anyhow::Error) -> anyhow::Result<Outcome> {
        let Some(status) = self.exit_code() else {
            return Err(error);
        };
        errors::report(&error);
        Ok(Outcome {
            status,
            report: errors::to_json(&error),
        })
    }

    /// The exit code of a command that ends because it was asked to.
    pub(super) fn exit_code(&self) -> Option<u8> {
        match self.signal.load(Ordering::Acquire) {
            0 => None,
            signal => Some(128 + signal as u8),
        }
    }
}
