//! A terminal whose keys go to a guest as they are pressed: raw mode, and the key that leaves it.
//!
//! A process has one terminal, and whichever of its threads ends the process must put it back: so what it was
//! before is kept in one place for all. What a console shows is still processed, a line feed alone goes to the
//! line's beginning: what forkvm itself prints stays readable between what the guest prints.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use rustix::termios::{
    InputModes, LocalModes, OptionalActions, OutputModes, SpecialCodeIndex, Termios, tcgetattr,
    tcsetattr,
};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;

/// Ctrl-], as in telnet and virsh.
pub(super) const ESCAPE: u8 = 0x1d;

/// What it was, as long as it is raw.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// What a raw terminal makes of the lines that are written to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lines {
    /// A line feed goes to the beginning of the next line: for a console, and what forkvm says beside it.
    Processed,
    /// For a terminal of the guest, which has processed its output itself.
    AsTheyCome,
}

/// Standard input is raw as long as this is there.
pub(super) struct RawTerminal(());

impl RawTerminal {
    /// Of standard input, a terminal. One of `fatal` signals ends the process as it always does, with the
    /// terminal put back.
    pub(super) fn begin(fatal: &[i32], lines: Lines) -> io::Result<RawTerminal> {
        let mut signals = Signals::new(fatal)?;
        let end = move || {
            if let Some(signal) = signals.forever().next() {
                restore();
                if let Err(error) = emulate_default_handler(signal) {
                    tracing::error!(%error, signal, "a signal that should end this process did not");
                }
            }
        };
        thread::Builder::new().name("terminal".into()).spawn(end)?;
        let before = tcgetattr(io::stdin())?;
        let raw = made_raw(&before, lines);
        *lock() = Some(before);
        tcsetattr(io::stdin(), OptionalActions::Now, &raw)?;
        Ok(RawTerminal(()))
    }
}

fn made_raw(before: &Termios, lines: Lines) -> Termios {
    let mut raw = before.clone();
    raw.local_modes -=
        LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG | LocalModes::IEXTEN;
    raw.input_modes -=
        InputModes::IXON | InputModes::ICRNL | InputModes::INLCR | InputModes::ISTRIP;
    if lines == Lines::AsTheyCome {
        raw.output_modes -= OutputModes::OPOST;
    }
    raw.special_codes[SpecialCodeIndex::VMIN] = 1;
    raw.special_codes[SpecialCodeIndex::VTIME] = 0;
    raw
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

/// Puts the terminal back, if it is raw. To be called by whoever ends the process at once.
pub(super) fn restore() {
    if let Some(before) = lock().take()
        && let Err(error) = tcsetattr(io::stdin(), OptionalActions::Now, &before)
    {
        tracing::warn!(%error, "the terminal could not be put back: `stty sane` does it");
    }
}

fn lock() -> MutexGuard<'static, Option<Termios>> {
    BEFORE.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use rustix::pty::{OpenptFlags, openpt};

    use super::*;

    #[test]
    fn a_terminal_of_the_guest_is_shown_as_it_comes_and_a_console_by_lines() {
        let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        let before = &mut tcgetattr(terminal).unwrap();
        before.output_modes |= OutputModes::OPOST;
        let is_processed = |lines| {
            let raw = made_raw(before, lines);
            assert!(!raw.local_modes.contains(LocalModes::ECHO));
            raw.output_modes.contains(OutputModes::OPOST)
        };
        assert!(is_processed(Lines::Processed));
        assert!(!is_processed(Lines::AsTheyCome));
    }
}
