//! A machine of a test, restored from the template, and what tests ask of it.

use std::io::Cursor;
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use forkvm::agent::protocol::{Exec, Exit};
use forkvm::engine::Family;
use forkvm::engine::saved::OpenMachine;
use forkvm::linux::LinuxVm;
use forkvm::vmm::Kvm;
use forkvm::{CloneSpec, FamilyConfig, MemoryMode, VsockSpec};
use tempfile::TempDir;

use super::common::{Kept, as_tests_are_to_run, with_causes};
use super::template::template;

/// How long an agent may take on a slow host.
pub(crate) const PATIENCE: Duration = Duration::from_secs(100);

/// A machine whose family ends with it.
pub(crate) struct Machine {
    pub(crate) vm: LinuxVm,
    pub(crate) consoles: Kept,
    _sockets: TempDir,
}

impl Machine {
    /// Of the template with this many vCPUs.
    pub(crate) fn restore(vcpus: u32) -> Machine {
        Machine::restore_by(vcpus, MemoryMode::Cow)
    }

    pub(crate) fn restore_by(vcpus: u32, memory_mode: MemoryMode) -> Machine {
        let template = OpenMachine::open(&template(vcpus)).unwrap();
        let sockets = tempfile::tempdir().unwrap();
        let consoles = Kept::default();
        let config = FamilyConfig {
            consoles: Arc::new(consoles.clone()),
            vsock: Some(VsockSpec {
                path: sockets.path().join("vsock"),
            }),
            ..as_tests_are_to_run()
        };
        let family = Family::new(Arc::new(Kvm::open().unwrap()), config);
        let vm = family
            .restore(template, None, memory_mode, &mut |_| {})
            .unwrap();
        let vm = LinuxVm::meet(family, vm, PATIENCE)
            .unwrap_or_else(|error| panic!("{}\n{}", with_causes(&error), consoles.text()));
        Machine {
            vm,
            consoles,
            _sockets: sockets,
        }
    }

    /// Forks it into clones that are themselves.
    pub(crate) fn fork(&self, spec: CloneSpec) -> Vec<LinuxVm> {
        let clones = self.vm.fork(spec);
        clones.unwrap_or_else(|error| panic!("{}\n{}", with_causes(&error), self.consoles.text()))
    }
}

impl Deref for Machine {
    type Target = LinuxVm;

    fn deref(&self) -> &LinuxVm {
        &self.vm
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("{}", self.consoles.text());
        }
        self.vm.family().end();
    }
}

/// What a program said and how it ended.
#[derive(Debug, PartialEq)]
pub(crate) struct Said {
    pub(crate) exit: Exit,
    pub(crate) out: String,
    pub(crate) err: String,
}

/// Runs a program with this input.
pub(crate) fn run(vm: &LinuxVm, argv: &[&str], input: &[u8]) -> Said {
    let exec = Exec {
        argv: argv.iter().map(|word| word.as_bytes().into()).collect(),
        ..Exec::default()
    };
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let input = Box::new(Cursor::new(input.to_vec()));
    let exit = vm
        .agent()
        .clone()
        .with_limit(PATIENCE)
        .exec(&exec)
        .and_then(|running| running.pump(Some(input), &mut out, &mut err))
        .unwrap_or_else(|error| {
            panic!(
                "{argv:?} in {}: {}",
                vm.identity().name,
                with_causes(&error)
            )
        });
    Said {
        exit,
        out: String::from_utf8(out).unwrap(),
        err: String::from_utf8(err).unwrap(),
    }
}

/// What a shell's script prints, which ends well.
pub(crate) fn sh(vm: &LinuxVm, script: &str) -> String {
    let said = run(vm, &["sh", "-c", script], b"");
    assert_eq!(said.exit, Exit::Code(0), "{script}: {said:?}");
    said.out.trim_end().to_owned()
}
