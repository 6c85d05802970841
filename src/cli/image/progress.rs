//! A build on a terminal: one bar, for the step that is under way. Elsewhere one line for each step.

use std::io::{self, IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use forkvm_linux_image::{Step, Watch};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

const PATIENCE: Duration = Duration::from_secs(1);

/// See the module's text. The bar goes when this is dropped.
pub(super) struct Bar {
    text: Box<dyn Write + Send>,
    stop: Arc<AtomicBool>,
    step: Option<Step>,
    since: Instant,
    bar: Option<ProgressBar>,
}

impl Bar {
    /// Ends the build when `stop` is set. Lines go to `text`.
    pub(super) fn new(text: Box<dyn Write + Send>, stop: Arc<AtomicBool>) -> Bar {
        Bar {
            text,
            stop,
            step: None,
            since: Instant::now(),
            bar: None,
        }
    }

    fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    fn begin(&mut self, step: Step) {
        self.clear();
        self.step = Some(step);
        self.since = Instant::now();
        if !io::stderr().is_terminal()
            && let Err(error) = writeln!(self.text, "{} ...", step.as_str())
        {
            tracing::warn!(%error, "the step could not be printed");
        }
    }
}

impl Watch for Bar {
    fn at(&mut self, step: Step, done: u64, total: u64) {
        if self.step != Some(step) {
            self.begin(step);
        }
        if self.bar.is_none() && self.since.elapsed() > PATIENCE && io::stderr().is_terminal() {
            self.bar = Some(draw(step));
        }
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
            bar.tick();
        }
    }

    fn stop(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.clear();
    }
}

fn draw(step: Step) -> ProgressBar {
    let template = match step {
        Step::Unpacking => "{msg} {bar:40} {bytes}/{total_bytes} {eta}",
        Step::Compiling => "{msg} {bar:40} {pos}/{len} {eta}",
        Step::Waiting | Step::Configuring | Step::Packing => "{msg} {spinner} {elapsed}",
    };
    let style = ProgressStyle::with_template(template);
    ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr())
        .with_message(step.as_str())
        .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}
