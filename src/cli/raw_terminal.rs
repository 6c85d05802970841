//! A terminal whose keys go to a guest as they are pressed: raw mode, and the key that leaves it.
//!
//! A process has one terminal, and whichever of its threads ends the process must put it back: so what it was
//! before is kept in one place for all. Output is still processed, a line feed alone goes to the line's
//! beginning: what forkvm itself prints stays readable between what the guest prints.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use rustix::termios::{
    InputModes, LocalModes, OptionalActions, SpecialCodeIndex, Termios, tcgetattr, tcsetattr,
};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;

/// Ctrl-], as in telnet and virsh.
pub(super) const ESCAPE: u8 = 0x1d;

/// What it was, as long as it is raw.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// Standard input is raw as long as this is there.
pub(super) struct RawTerminal(());

impl RawTerminal {
    /// Of standard input, a terminal. One of `fatal` signals ends the process as it always does, with the
    /// terminal put back.
    pub(super) fn begin(fatal: &[i32]) -> io::Result<RawTerminal> {
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
        let mut raw = before.clone();
        raw.local_modes -=
            LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG | LocalModes::IEXTEN;
        raw.input_modes -=
            InputModes::IXON | InputModes::ICRNL | InputModes::INLCR | InputModes::ISTRIP;
        raw.special_codes[SpecialCodeIndex::VMIN] = 1;
        raw.special_codes[SpecialCodeIndex::VTIME] = 0;
        *lock() = Some(before);
        tcsetattr(io::stdin(), OptionalActions::Now, &raw)?;
        Ok(RawTerminal(()))
    }
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
