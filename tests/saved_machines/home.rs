//! A family that saves, and what its oracle guests are asked.

use std::path::Path;
use std::sync::Arc;

use forkvm::abi::doorbell::report;
use forkvm::engine::saved::{OpenMachine, SaveTo};
use forkvm::engine::{Family, Member};
use forkvm::vmm::Kvm;
use forkvm::{
    BootSpec, CloneSpec, ConsoleDevice, DiskSource, DiskSpec, End, FamilyConfig, FaultConfig,
    MemoryMode, guest,
};

use super::common::{Kept, LONG, as_tests_are_to_run};

/// A family that saves to `dir`.
pub(crate) struct Home {
    pub(crate) family: Arc<Family>,
    pub(crate) consoles: Kept,
}

impl Home {
    pub(crate) fn saving_to(dir: &Path) -> Home {
        Home::filling(dir, FaultConfig::default().background)
    }

    /// The same; memory that is not there yet is filled at `background` MiB a second.
    pub(crate) fn filling(dir: &Path, background: Option<u32>) -> Home {
        let consoles = Kept::default();
        let config = FamilyConfig {
            consoles: Arc::new(consoles.clone()),
            saver: Some(Arc::new(SaveTo::new(dir))),
            faults: FaultConfig {
                background,
                ..FaultConfig::default()
            },
            ..as_tests_are_to_run()
        };
        Home {
            family: Family::new(Arc::new(Kvm::open().unwrap()), config),
            consoles,
        }
    }

    /// Boots a guest and waits until it is ready to be forked.
    pub(crate) fn boot(&self, vcpus: u32, disk: Option<DiskSource>, cmdline: &str) -> Arc<Member> {
        let disk = disk.map(|source| DiskSpec {
            name: "d0".into(),
            source,
        });
        let spec = BootSpec {
            name: "vm".into(),
            memory_mib: 64,
            vcpus,
            disks: disk.into_iter().collect(),
            payload: guest::bare(),
            cmdline: cmdline.into(),
            console: ConsoleDevice::Serial,
        };
        let vm = self.family.boot(spec).unwrap();
        vm.wait_report(report::READY, 1, LONG).unwrap();
        vm
    }

    pub(crate) fn restore(&self, dir: &Path) -> Arc<Member> {
        self.restore_as(dir, MemoryMode::Cow)
    }

    pub(crate) fn restore_as(&self, dir: &Path, memory_mode: MemoryMode) -> Arc<Member> {
        let machine = OpenMachine::open(dir).unwrap();
        self.family
            .restore(machine, None, memory_mode, &mut |_| {})
            .unwrap()
    }

    /// Forks the oracle, which then verifies everything, in itself and in the clone.
    pub(crate) fn verify_by_a_fork(&self, vm: &Member) -> Arc<Member> {
        let clone = vm.fork(CloneSpec::new(1)).unwrap().clones.remove(0);
        let fork = vm.identity().fork_count;
        let verified = vm.wait_report(report::USER + fork, 1, LONG);
        assert!(verified.is_ok(), "{verified:?}\n{}", self.consoles.text());
        clone
    }

    /// Forks the job `touch`, which then verifies its memory and ends, in itself and in the clone.
    pub(crate) fn verify_touch(&self, vm: &Member) -> Arc<Member> {
        vm.fork(CloneSpec::new(1)).unwrap().clones.remove(0)
    }

    /// Requires that a VM ended by itself and well.
    pub(crate) fn expect_well(&self, vm: &Member) {
        let end = vm.wait_for(LONG).expect("it ends").end;
        assert_eq!(end, End::Exited(0), "{}", self.consoles.text());
    }

    /// Tells the oracle to end.
    pub(crate) fn quit(&self, vm: &Member) {
        assert_eq!(vm.console_input(b"q").unwrap(), 1);
        self.expect_well(vm);
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        self.family.end();
    }
}

/// Names of what is in a directory, sorted.
pub(crate) fn names_in(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}
