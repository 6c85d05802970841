//! Signs of life for what takes longer than a second, on a terminal only.

use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

const PATIENCE: Duration = Duration::from_secs(1);

/// Says what is under way where nobody knows how long it takes. Gone when it is dropped.
pub(crate) struct Spinner(ProgressBar);

impl Spinner {
    /// Of `what`, such as "booting".
    pub(crate) fn new(what: &'static str) -> Spinner {
        let bar = if io::stderr().is_terminal() {
            ProgressBar::new_spinner()
        } else {
            ProgressBar::hidden()
        };
        bar.enable_steady_tick(Duration::from_millis(100));
        let spinner = Spinner(bar);
        spinner.say(what);
        spinner
    }

    /// Another step is under way.
    pub(crate) fn say(&self, what: &'static str) {
        self.0.set_message(what);
    }
}

impl Drop for Spinner {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// Progress in bytes. The bar goes when this is dropped.
pub(crate) struct Progress {
    what: &'static str,
    start: Instant,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// Of `what`, such as "loading memory".
    pub(crate) fn new(what: &'static str) -> Progress {
        Progress {
            what,
            start: Instant::now(),
            bar: None,
        }
    }

    /// `done` of `total` bytes are behind.
    pub(crate) fn update(&mut self, done: u64, total: u64) {
        if self.bar.is_none() && self.start.elapsed() > PATIENCE && io::stderr().is_terminal() {
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
            let style = ProgressStyle::with_template("{msg} {bar:40} {bytes}/{total_bytes} {eta}");
            self.bar = Some(
                bar.with_message(self.what)
                    .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar())),
            );
        }
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
