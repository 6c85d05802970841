//! Consoles that are kept, to be looked at where a machine did not do what it should.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use forkvm::Identity;
use forkvm::engine::Consoles;

/// Keeps what guests say.
#[derive(Clone, Default)]
pub(crate) struct Said(Arc<Mutex<Vec<u8>>>);

impl Said {
    pub(crate) fn text(&self) -> String {
        let bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Consoles for Said {
    fn open(&self, _vm: &Identity) -> io::Result<Box<dyn Write + Send>> {
        Ok(Box::new(self.clone()))
    }
}

impl Write for Said {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
