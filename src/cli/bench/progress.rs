//! What is at work, on a terminal.

use std::io::{self, IsTerminal};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use forkvm::bench::runner::Watch;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A progress bar; nothing where standard error is no terminal.
pub(super) struct Bar {
    bar: ProgressBar,
    stop: Arc<AtomicBool>,
}

impl Bar {
    /// Stops the run when `stop` is set.
    pub(super) fn new(stop: Arc<AtomicBool>) -> Bar {
        let bar = if io::stderr().is_terminal() {
            // Drawn seldom: drawing takes time from what is measured.
            ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr_with_hz(4))
        } else {
            ProgressBar::hidden()
        };
        let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed} {msg}");
        let bar = bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        Bar { bar, stop }
    }

    /// Takes it off the terminal, until there is more to show.
    pub(super) fn clear(&self) {
        self.bar.finish_and_clear();
        self.bar.reset();
    }
}

impl Watch for Bar {
    fn at(&mut self, done: u64, total: u64, on: &str) {
        self.bar.set_length(total);
        self.bar.set_position(done);
        self.bar.set_message(on.to_owned());
    }

    fn stops(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }
}
