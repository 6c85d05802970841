//! What clones of a worker print, on its way to the engine.
//!
//! A UART takes a byte at a time; a message for each would cost more than the guest's exit. So text is
//! sent by the line, in the vCPU's thread. The rest of a line that does not end, a prompt, is sent
//! after a moment, or before whatever else the clone tells.

use std::io::{self, Write};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use super::Engine;
use crate::wire::Told;

/// How long the rest of a line may wait for its end.
const MOMENT: Duration = Duration::from_millis(10);

/// Most bytes that wait for the end of a line.
const LONG_LINE: usize = 1024;

/// Most bytes of a message.
const MOST: usize = 16 * 1024;

/// All consoles of a worker, and the thread that sends what waits.
pub(super) struct Consoles {
    engine: Arc<Engine>,
    waiting: Sender<Weak<Console>>,
}

/// One clone's.
pub(super) struct Console {
    clone: u64,
    engine: Arc<Engine>,
    unsent: Mutex<Vec<u8>>,
    /// Where it says that something waits.
    waiting: Sender<Weak<Console>>,
}

impl Consoles {
    pub(super) fn start(engine: Arc<Engine>) -> io::Result<Consoles> {
        let (waiting, consoles) = channel();
        thread::Builder::new()
            .name("consoles".into())
            .spawn(move || send_what_waits(&consoles))?;
        Ok(Consoles { engine, waiting })
    }

    pub(super) fn open(&self, clone: u64) -> Arc<Console> {
        Arc::new(Console {
            clone,
            engine: self.engine.clone(),
            unsent: Mutex::default(),
            waiting: self.waiting.clone(),
        })
    }
}

fn send_what_waits(consoles: &Receiver<Weak<Console>>) {
    while let Ok(first) = consoles.recv() {
        thread::sleep(MOMENT);
        let waiting = std::iter::once(first).chain(consoles.try_iter());
        waiting
            .filter_map(|console| console.upgrade())
            .for_each(|console| console.send());
    }
}

impl Console {
    /// For its UART.
    pub(super) fn writer(console: &Arc<Console>) -> Box<dyn Write + Send> {
        Box::new(Uart(console.clone()))
    }

    /// Sends what waits. Whoever sends at the same time comes after.
    pub(super) fn send(&self) {
        self.send_all(&mut self.lock());
    }

    fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
        self.unsent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send_all(&self, unsent: &mut Vec<u8>) {
        let clone = self.clone;
        for bytes in unsent.chunks(MOST) {
            let bytes = bytes.to_vec();
            self.engine.tell(&Told::Printed { clone, bytes }, &[]);
        }
        unsent.clear();
    }
}

struct Uart(Arc<Console>);

impl Write for Uart {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let console = &self.0;
        let mut unsent = console.lock();
        let waits = !unsent.is_empty();
        unsent.extend_from_slice(bytes);
        if bytes.contains(&b'\n') || unsent.len() >= LONG_LINE {
            console.send_all(&mut unsent);
        } else if !waits && console.waiting.send(Arc::downgrade(console)).is_err() {
            // Without that thread each byte goes by itself.
            console.send_all(&mut unsent);
        }
        Ok(bytes.len())
    }

    /// A UART flushes each byte; see the module's text.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
