//! Save, end the process, restore in another one.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;

use forkvm::abi::doorbell::report;
use forkvm::engine::saved::{OpenMachine, SaveTo};
use forkvm::engine::{Family, Member};
use forkvm::vmm::Kvm;
use forkvm::{BootSpec, CloneSpec, DiskSource, DiskSpec, End, FamilyConfig, guest};
use serde_json::Value;
use tempfile::tempdir;

use super::common::{Kept, LONG, need_kvm};
use super::harness::{Running, forkvm, names_in};

/// A family that saves to `dir`.
pub(crate) struct Home {
    pub(crate) family: Arc<Family>,
    pub(crate) consoles: Kept,
}

impl Home {
    pub(crate) fn saving_to(dir: &Path) -> Home {
        let consoles = Kept::default();
        let config = FamilyConfig {
            consoles: Arc::new(consoles.clone()),
            saver: Some(Arc::new(SaveTo::new(dir))),
            ..FamilyConfig::default()
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
        };
        let vm = self.family.boot(spec).unwrap();
        vm.wait_report(report::READY, 1, LONG).unwrap();
        vm
    }

    pub(crate) fn restore(&self, dir: &Path) -> Arc<Member> {
        let machine = OpenMachine::open(dir).unwrap();
        self.family.restore(machine, None, &mut |_| {}).unwrap()
    }

    /// Forks the oracle, which then verifies everything, in itself and in the clone.
    pub(crate) fn verify_by_a_fork(&self, vm: &Member) -> Arc<Member> {
        let clone = vm.fork(CloneSpec::new(1)).unwrap().clones.remove(0);
        let fork = vm.identity().fork_count;
        let verified = vm.wait_report(report::USER + fork, 1, LONG);
        assert!(verified.is_ok(), "{verified:?}\n{}", self.consoles.text());
        clone
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

#[test]
fn a_guest_that_asked_to_be_saved_goes_on_in_another_process_any_number_of_times() {
    need_kvm!();
    let dir = tempdir().unwrap();
    let dir = dir.path();
    let args = [
        "run",
        "--guest",
        "save mib=8",
        "--memory",
        "64",
        "--save",
        "saved",
    ];
    let saved = forkvm(dir, &args);
    saved.expect(0, "`forkvm restore saved` lets it run on");
    assert_eq!(saved.stdout(), "", "it was ended at the save");
    for _ in 0..2 {
        let restored = forkvm(dir, &["restore", "saved"]);
        assert_eq!(restored.code(), 0, "{}", restored.stderr());
        assert_eq!(restored.stdout().trim(), "restored");
    }
    assert_eq!(names_in(dir), ["saved"]);
}

#[test]
fn a_busy_machine_is_saved_by_ctrl_c_restored_and_saved_again() {
    need_kvm!();
    let dir = tempdir().unwrap();
    let dir = dir.path();
    super::harness::disk(dir, "d.img", 1);
    let job = "oracle mib=4 writers=1 disk=1";
    let args = ["run", "--guest", job, "--memory", "64", "--vcpus", "2"];
    let run = [&args[..], &["--disk", "d.img,overlay", "--save", "one"]].concat();
    let mut running = Running::start(dir, &run);
    running.wait_for_vms(1).signal("INT");
    running.wait().expect(0, "vm was saved");

    let mut running = Running::start(dir, &["restore", "one", "--save", "two"]);
    running.wait_for_vms(1).signal("TERM");
    running.wait().expect(0, "vm was saved");

    for saved in ["one", "two"] {
        let mut running = Running::start_with(dir, &["restore", saved], Stdio::piped());
        running
            .child()
            .stdin
            .take()
            .unwrap()
            .write_all(b"q")
            .unwrap();
        let ended = running.wait();
        assert_eq!(ended.code(), 0, "{}{}", ended.stdout(), ended.stderr());
        assert!(ended.stdout().contains("oracle done"), "{}", ended.stdout());
    }
}

#[test]
fn a_restored_machine_has_all_its_memory_registers_and_counters() {
    need_kvm!();
    for vcpus in [1, 2, 4] {
        let dir = tempdir().unwrap();
        let saved = dir.path().join("saved");
        let home = Home::saving_to(&saved);
        let vm = home.boot(vcpus, None, "job=oracle mib=4 writers=1");
        vm.save().unwrap();
        assert_eq!(vm.wait().end, End::Saved);

        let home = Home::saving_to(&dir.path().join("again"));
        let vm = home.restore(&saved);
        home.expect_well(&home.verify_by_a_fork(&vm));
        home.quit(&vm);
    }
}

#[test]
fn a_forked_parent_and_a_clone_are_saved_with_the_memory_that_each_sees() {
    need_kvm!();
    let dir = tempdir().unwrap();
    let saved = dir.path().join("saved");
    let home = Home::saving_to(&saved);
    let vm = home.boot(2, None, "job=oracle mib=4 writers=1 go-on=1");
    let clone = home.verify_by_a_fork(&vm);
    clone.wait_report(report::USER + 1, 1, LONG).unwrap();
    // A clone that is saved does not take its parent's place.
    clone.save().unwrap();
    vm.save().unwrap();
    assert_eq!(names_in(dir.path()), ["saved", "saved-vm.1"]);

    for name in ["saved", "saved-vm.1"] {
        let home = Home::saving_to(&dir.path().join("again"));
        let vm = home.restore(&dir.path().join(name));
        let identity = vm.identity();
        assert_eq!(
            (identity.fork_count, identity.depth, identity.clone_id),
            (1, 0, 0)
        );
        let clone = home.verify_by_a_fork(&vm);
        clone.wait_report(report::USER + 2, 1, LONG).unwrap();
        home.quit(&clone);
        home.quit(&vm);
    }
}

#[test]
fn a_save_that_fails_leaves_the_machine_running_and_nothing_on_disk() {
    need_kvm!();
    let dir = tempdir().unwrap();
    let home = Home::saving_to(&dir.path().join("no/such/place"));
    let vm = home.boot(1, None, "job=oracle mib=1");
    vm.save().unwrap_err();
    assert!(names_in(dir.path()).is_empty());
    home.expect_well(&home.verify_by_a_fork(&vm));
    home.quit(&vm);
}

#[test]
fn a_save_that_is_killed_leaves_nothing_in_the_way_of_the_next() {
    need_kvm!();
    let dir = tempdir().unwrap();
    let dir = dir.path();
    let args = [
        "run",
        "--guest",
        "touch mib=400",
        "--memory",
        "512",
        "--save",
        "saved",
    ];
    let is_partial = |name: &String| name.starts_with("saved.partial-");
    let mut killed = 0;
    for _ in 0..3 {
        let mut running = Running::start(dir, &args);
        running.wait_for_vms(1);
        // Without memory to write there would be no time to kill it in.
        std::thread::sleep(std::time::Duration::from_millis(700));
        running.signal("INT");
        running.wait_until("the save has begun", || {
            names_in(dir).iter().any(is_partial)
        });
        running.signal("KILL");
        running.child().wait().unwrap();
        if !dir.join("saved").exists() {
            killed += 1;
            forkvm(dir, &["restore", "saved"]).expect(1, "cannot open saved/state");
        } else {
            fs::remove_dir_all(dir.join("saved")).unwrap();
        }
    }
    assert!(killed > 0, "no save was met half-way");
    let args = [
        "run",
        "--guest",
        "save mib=1",
        "--memory",
        "64",
        "--save",
        "saved",
    ];
    forkvm(dir, &args).expect(0, "vm was saved");
    assert_eq!(names_in(dir), ["saved"]);
}

#[test]
fn state_show_tells_what_a_saved_machine_is() {
    need_kvm!();
    let dir = tempdir().unwrap();
    let dir = dir.path();
    super::harness::disk(dir, "d.img", 1);
    let args = [
        "run",
        "--guest",
        "save mib=1",
        "--memory",
        "64",
        "--vcpus",
        "2",
    ];
    let run = [
        &args[..],
        &["--disk", "d.img,ro,name=data", "--save", "saved"],
    ]
    .concat();
    assert_eq!(forkvm(dir, &run).code(), 0);
    let shown = forkvm(dir, &["state", "show", "saved", "--json", "-"]);
    let value: Value = serde_json::from_str(&shown.stdout()).unwrap();
    let kinds: Vec<&str> = value["sections"]
        .as_array()
        .unwrap()
        .iter()
        .map(|section| section["kind"].as_str().unwrap())
        .collect();
    for kind in [
        "config",
        "kvm/vcpu/1",
        "dev/doorbell",
        "identity",
        "disk/data",
    ] {
        assert!(kinds.contains(&kind), "{kind} is not in {kinds:?}");
    }
    let machine = &value["machine"];
    assert_eq!(machine["vcpus"].as_array().unwrap().len(), 2);
    assert!(
        machine["vcpus"][0]["rip"]
            .as_str()
            .unwrap()
            .starts_with("0x")
    );
    assert_eq!(machine["disks"][0]["kind"], "read-only");
    assert!(
        machine["disks"][0]["base"]
            .as_str()
            .unwrap()
            .ends_with("/d.img")
    );
    assert_eq!(value["memory"]["memory_mib"], 64);
    // The state file alone does as well, without a look at the memory.
    let text = forkvm(dir, &["state", "show", "saved/state"]).stdout();
    assert!(
        text.contains("kvm/vcpu/0") && text.contains("RIP 0x"),
        "{text}"
    );
}
