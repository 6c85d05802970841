//! Taps on consoles: what VMs print goes on to where it went, and a copy of it to whoever listens.
//!
//! A VM must not wait for a listener, which may be a client that does not read. What one has not taken is kept
//! up to a limit; beyond that it is lost to that listener, and he is told how much.

use std::collections::HashMap;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use forkvm::Identity;
use forkvm::engine::Consoles;

use super::bell::Bell;

/// Bytes that are kept for a listener.
const KEPT: usize = 1024 * 1024;

/// The taps of a family, and the consoles behind them.
pub(crate) struct Taps {
    consoles: Box<dyn Consoles>,
    by_name: Mutex<HashMap<String, Weak<Tap>>>,
}

/// What one VM prints.
#[derive(Default)]
struct Tap(Mutex<Vec<Weak<Listener>>>);

/// Somebody who listens.
pub(super) struct Listener {
    heard: Mutex<Heard>,
    bell: Arc<Bell>,
}

/// What he has not taken yet.
#[derive(Default)]
pub(super) struct Heard {
    pub(super) bytes: Vec<u8>,
    /// Bytes behind those, which are lost.
    pub(super) lost: u64,
}

struct Tapped {
    tap: Arc<Tap>,
    to: Box<dyn Write + Send>,
}

impl Taps {
    pub(crate) fn new(consoles: impl Consoles + 'static) -> Taps {
        Taps {
            consoles: Box::new(consoles),
            by_name: Mutex::default(),
        }
    }

    fn by_name(&self) -> MutexGuard<'_, HashMap<String, Weak<Tap>>> {
        self.by_name.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hears what the VM `name` prints from now on; `bell` rings when it does. `None` when it prints nothing
    /// any more.
    pub(super) fn listen(&self, name: &str, bell: &Arc<Bell>) -> Option<Arc<Listener>> {
        let tap = self.by_name().get(name)?.upgrade()?;
        let listener = Arc::new(Listener {
            heard: Mutex::default(),
            bell: bell.clone(),
        });
        let mut listeners = tap.0.lock().unwrap_or_else(PoisonError::into_inner);
        listeners.retain(|listener| listener.strong_count() > 0);
        listeners.push(Arc::downgrade(&listener));
        Some(listener)
    }
}

impl Consoles for Taps {
    fn open(&self, vm: &Identity) -> io::Result<Box<dyn Write + Send>> {
        let to = self.consoles.open(vm)?;
        let mut by_name = self.by_name();
        // A clone that is rewound opens its console once more, before the former one is closed.
        let known = by_name.get(&vm.name).and_then(Weak::upgrade);
        let tap = known.unwrap_or_else(|| {
            by_name.retain(|_, tap| tap.strong_count() > 0);
            let tap = Arc::new(Tap::default());
            by_name.insert(vm.name.clone(), Arc::downgrade(&tap));
            tap
        });
        Ok(Box::new(Tapped { tap, to }))
    }
}

impl Write for Tapped {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.to.write(bytes);
        // Also where it cannot be written: it was printed all the same.
        let printed = *written.as_ref().unwrap_or(&bytes.len());
        self.tap.hear(&bytes[..printed]);
        written
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

impl Tap {
    fn hear(&self, bytes: &[u8]) {
        let listeners = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for listener in listeners.iter().filter_map(Weak::upgrade) {
            listener.hear(bytes);
        }
    }
}

impl Listener {
    fn lock(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hear(&self, bytes: &[u8]) {
        let mut heard = self.lock();
        // What is lost is one piece: nothing is kept behind it.
        let room = if heard.lost == 0 {
            KEPT - heard.bytes.len()
        } else {
            0
        };
        let kept = room.min(bytes.len());
        heard.bytes.extend_from_slice(&bytes[..kept]);
        heard.lost += (bytes.len() - kept) as u64;
        drop(heard);
        self.bell.ring();
    }

    /// What was printed since the last call.
    pub(super) fn take(&self) -> Heard {
        std::mem::take(&mut *self.lock())
    }
}

#[cfg(test)]
mod tests {
    use forkvm::engine::NoConsoles;

    use super::*;

    fn console(taps: &Taps) -> Box<dyn Write + Send> {
        taps.open(&Identity::root("X").unwrap()).unwrap()
    }

    #[test]
    fn what_is_printed_is_heard_from_the_beginning_of_listening_on() {
        let taps = Taps::new(NoConsoles);
        let bell = Arc::new(Bell::new().unwrap());
        assert!(taps.listen("X", &bell).is_none());
        let mut console = console(&taps);
        console.write_all(b"before").unwrap();
        let listener = taps.listen("X", &bell).unwrap();
        console.write_all(b"one ").unwrap();
        console.write_all(b"two").unwrap();
        assert_eq!(listener.take().bytes, b"one two");
        assert!(listener.take().bytes.is_empty());
        drop(console);
        assert!(taps.listen("X", &bell).is_none());
    }

    #[test]
    fn who_does_not_take_what_he_hears_loses_the_rest_and_learns_how_much() {
        let taps = Taps::new(NoConsoles);
        let mut console = console(&taps);
        let listener = taps.listen("X", &Arc::new(Bell::new().unwrap())).unwrap();
        console.write_all(&vec![b'.'; KEPT - 1]).unwrap();
        console.write_all(b"ab").unwrap();
        console.write_all(b"c").unwrap();
        let heard = listener.take();
        assert_eq!((heard.bytes.len(), heard.lost), (KEPT, 2));
        assert_eq!(heard.bytes.last(), Some(&b'a'));
        console.write_all(b"d").unwrap();
        assert_eq!(listener.take().bytes, b"d");
    }
}
