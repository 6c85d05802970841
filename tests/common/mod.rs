//! What the KVM tests have in common: a guest on the embedded image, with its consoles kept.

#![allow(dead_code, unreachable_pub, unused_imports)] // Each test binary uses a part of it.

mod obey;
mod oracle;
mod part;
mod setup;
pub mod switch;
mod test_group;
mod test_mappings;

use std::error::Error;
use std::io::{self, Write};
use std::ops::Deref;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use forkvm::engine::{Consoles, ForkLog};
use forkvm::{Identity, Vm};

pub use obey::Obedient;
pub use oracle::{expect_end, expect_oracle_ok, finish_oracle};
pub use part::{is_part, part_arguments, run_part};
pub(crate) use setup::need_kvm;
pub use setup::{
    Setup, as_tests_are_to_run, fork_by, full_scale, has_kvm, scaled, worker_program, workers,
    workers_of,
};
pub use test_group::TestGroup;
pub use test_mappings::leave_mappings;

/// Far beyond what anything here takes on a slow host.
pub const LONG: Duration = Duration::from_secs(120);

/// An error with all its causes, in one text.
pub fn with_causes(error: &dyn Error) -> String {
    match error.source() {
        Some(cause) => format!("{error}: {}", with_causes(cause)),
        None => error.to_string(),
    }
}

/// Consoles of a whole family, in one text.
#[derive(Clone, Default)]
pub struct Kept(Arc<Mutex<String>>);

impl Kept {
    /// All that was printed, each line behind the name of its VM.
    pub fn text(&self) -> String {
        self.text_from(0)
    }

    /// The same without its first `from` bytes.
    pub fn text_from(&self, from: usize) -> String {
        self.0.lock().unwrap()[from..].to_owned()
    }

    /// Bytes that were printed.
    pub fn len(&self) -> usize {
        self.0.lock().unwrap().len()
    }
}

impl Consoles for Kept {
    fn open(&self, vm: &Identity) -> io::Result<Box<dyn Write + Send>> {
        Ok(Box::new(Line {
            name: vm.name.clone(),
            line: Vec::new(),
            kept: self.0.clone(),
        }))
    }
}

struct Line {
    name: String,
    line: Vec<u8>,
    kept: Arc<Mutex<String>>,
}

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for &byte in bytes {
            self.line.push(byte);
            if byte == b'\n' {
                let line = String::from_utf8_lossy(&self.line);
                self.kept
                    .lock()
                    .unwrap()
                    .push_str(&format!("{}: {line}", self.name));
                self.line.clear();
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A VM under test. Its whole family ends with it.
pub struct Guest {
    vm: Vm,
    pub consoles: Kept,
    pub log: Arc<ForkLog>,
}

impl Deref for Guest {
    type Target = Vm;

    fn deref(&self) -> &Vm {
        &self.vm
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.vm.family().end();
    }
}

/// Boots the embedded guest with a job.
pub fn boot(name: &str, memory_mib: u64, vcpus: u32, cmdline: &str) -> Guest {
    Setup::new(cmdline)
        .name(name)
        .memory_mib(memory_mib)
        .vcpus(vcpus)
        .boot()
}
