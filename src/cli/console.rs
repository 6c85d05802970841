//! Consoles of a family on one terminal.
//!
//! The VM that was started prints as it is. A clone's lines come whole, behind its name in brackets,
//! or go to a file of its own. Input goes to the VM that was started.

use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use forkvm::Identity;
use forkvm::engine::{Consoles, Member};

use super::raw_terminal::ESCAPE;

/// A clone's line that is longer is cut here.
const LINE_LEN: usize = 16 * 1024;

/// How long a clone's line waits for the end of a line that the VM that was started has begun.
const LINE_PATIENCE: Duration = Duration::from_millis(50);

/// How long to wait when the guest's UART is full.
const FULL_PAUSE: Duration = Duration::from_millis(20);

/// See the module's text.
pub(crate) struct Terminal {
    shared: Arc<Shared>,
    dir: Option<PathBuf>,
}

struct Shared {
    screen: Mutex<Screen>,
    /// Signalled when a line ends.
    line_ended: Condvar,
}

struct Screen {
    out: Box<dyn Write + Send>,
    /// The VM that was started has begun a line.
    mid_line: bool,
}

impl Terminal {
    /// On `out`, with the clones' files in `dir` if there is one.
    pub(crate) fn new(out: Box<dyn Write + Send>, dir: Option<PathBuf>) -> Terminal {
        Terminal {
            shared: Arc::new(Shared {
                screen: Mutex::new(Screen {
                    out,
                    mid_line: false,
                }),
                line_ended: Condvar::new(),
            }),
            dir,
        }
    }
}

impl Consoles for Terminal {
    fn open(&self, vm: &Identity) -> io::Result<Box<dyn Write + Send>> {
        if vm.depth == 0 {
            return Ok(Box::new(Direct(self.shared.clone())));
        }
        match &self.dir {
            Some(dir) => Ok(Box::new(File::create(file_of(dir, &vm.name))?)),
            None => Ok(Box::new(Prefixed {
                prefix: format!("[{}] ", vm.name),
                line: Vec::new(),
                shared: self.shared.clone(),
            })),
        }
    }
}

/// The file of a clone's console.
fn file_of(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.log"))
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Screen> {
        self.screen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The console of the VM that was started.
struct Direct(Arc<Shared>);

impl Write for Direct {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut screen = self.0.lock();
        let written = screen.out.write(bytes)?;
        if let Some(last) = bytes[..written].last() {
            screen.mid_line = *last != b'\n';
        }
        if !screen.mid_line {
            self.0.line_ended.notify_all();
        }
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.lock().out.flush()
    }
}

/// A clone's console.
struct Prefixed {
    prefix: String,
    line: Vec<u8>,
    shared: Arc<Shared>,
}

impl Prefixed {
    fn print_line(&mut self) -> io::Result<()> {
        let waited = self.shared.line_ended.wait_timeout_while(
            self.shared.lock(),
            LINE_PATIENCE,
            |screen| screen.mid_line,
        );
        let mut screen = waited.unwrap_or_else(PoisonError::into_inner).0;
        let mut text = Vec::with_capacity(self.prefix.len() + self.line.len() + 2);
        if screen.mid_line {
            text.push(b'\n');
            screen.mid_line = false;
        }
        text.extend_from_slice(self.prefix.as_bytes());
        text.append(&mut self.line);
        text.push(b'\n');
        screen.out.write_all(&text)?;
        screen.out.flush()
    }
}

impl Write for Prefixed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for &byte in bytes {
            if byte != b'\n' {
                self.line.push(byte);
            }
            if byte == b'\n' || self.line.len() >= LINE_LEN {
                self.print_line()?;
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Prefixed {
    fn drop(&mut self) {
        if !self.line.is_empty()
            && let Err(error) = self.print_line()
        {
            tracing::debug!(%error, "the last line of a clone is lost");
        }
    }
}

/// Passes standard input to the VM's console, when it is a terminal, a pipe or a socket, until
/// either ends. `escape` is called instead of passing on a key [`ESCAPE`], if there is one.
pub(crate) fn pass_input(vm: Arc<Member>, escape: Option<fn()>) -> io::Result<()> {
    if !is_live(&io::stdin()) {
        return Ok(());
    }
    let pass = move || {
        let mut buffer = [0; 256];
        while let Ok(len @ 1..) = io::stdin().read(&mut buffer) {
            let typed = &buffer[..len];
            let Some(escape) = escape else {
                if !pass_on(typed, &vm) {
                    return;
                }
                continue;
            };
            let mut between = typed.split(|byte| *byte == ESCAPE);
            if !between.next().is_none_or(|keys| pass_on(keys, &vm)) {
                return;
            }
            for keys in between {
                escape();
                if !pass_on(keys, &vm) {
                    return;
                }
            }
        }
    };
    thread::Builder::new().name("stdin".into()).spawn(pass)?;
    Ok(())
}

/// `false` when the VM has ended.
fn pass_on(mut typed: &[u8], vm: &Member) -> bool {
    while !typed.is_empty() {
        match vm.console_input(typed) {
            Ok(taken) => typed = &typed[taken..],
            Err(_ended) => return false,
        }
        if !typed.is_empty() {
            thread::sleep(FULL_PAUSE);
        }
    }
    true
}

/// Asked of the descriptor, not of /dev/stdin, which a small system may not have.
pub(super) fn is_live(stdin: &io::Stdin) -> bool {
    let kind = || {
        File::from(stdin.as_fd().try_clone_to_owned()?)
            .metadata()
            .map(|m| m.file_type())
    };
    stdin.is_terminal() || kind().is_ok_and(|kind| kind.is_fifo() || kind.is_socket())
}
