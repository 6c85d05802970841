//! Identities in a machine that only notes what is done to it.

use std::io;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use forkvm_agent_protocol::{Bytes, Generation, Identity};

use super::{HookError, IdentifyError, Identities, Role, System};

/// An identity whose generation is `byte` sixteen times.
pub(crate) fn identity(clone_id: u32, byte: u8) -> Identity {
    Identity {
        clone_id,
        generation: Generation([byte; 16]),
        hostname: format!("clone-{clone_id}"),
        machine_id: "0123456789abcdef".repeat(2),
        entropy: Bytes(vec![byte; 32]),
        wall_clock: 1_700_000_000_000_000_000,
        cid: 3,
    }
}

/// A machine whose step `fails` does.
struct Notes {
    done: Arc<Mutex<Vec<String>>>,
    fails: &'static str,
}

impl Notes {
    fn step(&self, name: &str, what: &str) -> io::Result<()> {
        if name == self.fails {
            return Err(io::Error::from_raw_os_error(libc::EPERM));
        }
        self.done.lock().unwrap().push(format!("{name} {what}"));
        Ok(())
    }
}

impl System for Notes {
    fn wait_for_address(&self, cid: u64) -> io::Result<()> {
        self.step("address", &cid.to_string())
    }

    fn set_hostname(&self, name: &str) -> io::Result<()> {
        self.step("hostname", name)
    }

    fn set_machine_id(&self, id: &str) -> io::Result<()> {
        self.step("machine-id", id)
    }

    fn reseed(&self, entropy: &[u8]) -> io::Result<()> {
        self.step("entropy", &entropy.len().to_string())
    }

    fn set_wall_clock(&self, nanoseconds: u64) -> io::Result<()> {
        self.step("clock", &nanoseconds.to_string())
    }

    fn run_hooks(&self, role: Role, _generation: Generation) -> Result<Vec<String>, HookError> {
        let name = "app".to_owned();
        match self.step("hooks", &format!("{role:?}")) {
            Ok(()) => Ok(vec![name]),
            Err(_) => Err(HookError::Failed { name, status: 1 }),
        }
    }

    fn clock_source(&self) -> String {
        "kvm-clock".into()
    }
}

fn machine(fails: &'static str) -> (Identities, Arc<Mutex<Vec<String>>>) {
    let done = Arc::new(Mutex::new(Vec::new()));
    let notes = Notes {
        done: done.clone(),
        fails,
    };
    (Identities::new(Box::new(notes)), done)
}

#[test]
fn all_steps_are_taken_in_order_and_acknowledged() {
    let (identities, done) = machine("");
    let identified = identities.identify(&identity(2, 5)).unwrap();
    assert_eq!(identified.generation, Generation([5; 16]));
    assert_eq!(identified.clock_source, "kvm-clock");
    assert_eq!(identified.hooks, ["app"]);
    assert_eq!(
        *done.lock().unwrap(),
        [
            "address 3",
            "hostname clone-2",
            "machine-id 0123456789abcdef0123456789abcdef",
            "entropy 32",
            "clock 1700000000000000000",
            "hooks Clone(2)"
        ]
    );
    let steps: Vec<&str> = identified.steps.iter().map(|took| &*took.step).collect();
    let all = "vsock-address hostname machine-id entropy clock hooks";
    assert_eq!(steps.join(" "), all);
    assert_eq!(identities.current().unwrap().clone_id, 2);
}

#[test]
fn a_parent_runs_its_hooks_at_each_fork_and_stays_who_it_is() {
    let (identities, done) = machine("");
    identities.identify(&identity(3, 5)).unwrap();
    done.lock().unwrap().clear();
    assert_eq!(identities.after_fork().unwrap(), ["app"]);
    assert_eq!(identities.after_fork().unwrap(), ["app"]);
    assert_eq!(*done.lock().unwrap(), ["hooks Parent", "hooks Parent"]);
    assert_eq!(identities.current().unwrap().clone_id, 3);
}

#[test]
fn the_same_generation_again_changes_nothing_and_is_acknowledged() {
    let (identities, done) = machine("");
    let first = identities.identify(&identity(2, 5)).unwrap();
    let steps = done.lock().unwrap().len();
    assert_eq!(identities.identify(&identity(2, 5)).unwrap(), first);
    assert_eq!(done.lock().unwrap().len(), steps);
    identities.identify(&identity(1, 6)).unwrap();
    assert_eq!(done.lock().unwrap().len(), 2 * steps);
}

#[test]
fn a_step_that_fails_fails_the_whole_by_its_name_and_ends_it_there() {
    for (fails, said, before) in [
        ("address", "vsock address", 0),
        ("hostname", "hostname", 1),
        ("machine-id", "/etc/machine-id", 2),
        ("entropy", "random numbers", 3),
        ("clock", "clock", 4),
        ("hooks", "\"app\"", 5),
    ] {
        let (identities, done) = machine(fails);
        let error = identities.identify(&identity(1, 1)).unwrap_err();
        assert!(error.to_string().contains(said), "{fails}: {error}");
        assert_eq!(done.lock().unwrap().len(), before, "{fails}");
        assert_eq!(identities.current(), None);
    }
}

#[test]
fn an_identity_that_cannot_be_right_changes_nothing() {
    let (identities, done) = machine("");
    let mut wrong = [identity(1, 1), identity(1, 1), identity(1, 1)];
    wrong[0].hostname.clear();
    wrong[1].machine_id = "0123456789ABCDEF".repeat(2);
    wrong[2].entropy.0.pop();
    for wrong in &wrong {
        identities.identify(wrong).unwrap_err();
    }
    assert!(done.lock().unwrap().is_empty());
}

#[test]
fn who_waits_for_a_generation_goes_on_when_it_is_taken_on() {
    let (identities, _) = machine("");
    identities.identify(&identity(0, 1)).unwrap();
    thread::scope(|scope| {
        let waits =
            scope.spawn(|| identities.wait_for(Generation([2; 16]), Duration::from_secs(60)));
        identities.identify(&identity(1, 2)).unwrap();
        waits.join().unwrap().unwrap();
    });
}

#[test]
fn a_clone_that_nobody_identifies_does_not_go_on() {
    let (identities, _) = machine("");
    identities.identify(&identity(0, 1)).unwrap();
    let error = identities
        .wait_for(Generation([2; 16]), Duration::from_millis(1))
        .unwrap_err();
    assert!(
        matches!(error, IdentifyError::NotIdentified { .. }),
        "{error}"
    );
    assert!(error.to_string().contains("0202"), "{error}");
}
