//! What workers cannot do, and programs that are none: each is refused by name.

use std::env;
use std::process::Command;

use forkvm::{CloneSpec, Process, ProcessConfig, WorkerProgram};

use crate::common::{LONG, Obedient, Setup, need_kvm, worker_program, workers_of};

fn refused(program: WorkerProgram) -> String {
    let error = Process::start(ProcessConfig::new(program)).err();
    error.expect("it is no worker").to_string()
}

#[test]
fn a_program_that_is_no_worker_is_refused_by_its_name_and_what_it_did() {
    let program = |path: &str, args: &[&str]| WorkerProgram {
        path: path.into(),
        args: args.iter().map(Into::into).collect(),
    };
    let text = refused(program("/no/such/program", &[]));
    assert!(text.contains("/no/such/program"), "{text}");
    let text = refused(program("/bin/true", &[]));
    assert!(
        text.contains("/bin/true") && text.contains("exit status: 0"),
        "{text}"
    );
    let text = refused(program("/bin/sh", &["-c", "exit 3"]));
    assert!(text.contains("exit status: 3"), "{text}");
    let text = refused(program(
        "/bin/sh",
        &["-c", "echo rubbish >&0; exec sleep 9"],
    ));
    assert!(text.contains("could not be decoded"), "{text}");
}

#[test]
fn a_worker_that_is_started_by_hand_says_so() {
    let output = Command::new(worker_program().path)
        .arg("worker")
        .stdin(std::process::Stdio::null())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("never by hand"), "{text}");
}

/// Set for the part of a test that runs in a process with few descriptors.
const FEW_DESCRIPTORS: &str = "FORKVM_TEST_FEW_DESCRIPTORS";

#[test]
fn a_worker_that_runs_out_of_descriptors_says_so_and_the_fork_is_rolled_back() {
    need_kvm!();
    let mut child = Command::new("sh");
    child
        .args(["-c", "ulimit -n 80 && exec \"$0\" \"$@\""])
        .arg(env::current_exe().unwrap())
        .args(["--exact", "refusals::in_a_process_with_few_descriptors"])
        .args(["--ignored", "--nocapture"])
        .env(FEW_DESCRIPTORS, "1");
    let output = child.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}\n{errors}");
    assert!(text.contains("1 passed"), "{text}");
}

#[test]
#[ignore = "a_worker_that_runs_out_of_descriptors_says_so_and_the_fork_is_rolled_back runs it"]
fn in_a_process_with_few_descriptors() {
    if env::var_os(FEW_DESCRIPTORS).is_none() {
        println!("skipped: only a part of another test");
        return;
    }
    let vm = Setup::new("job=obey pages=16")
        .spawner(workers_of(1, 500))
        .boot();
    vm.wait_ready(LONG).unwrap();
    let mut parent = Obedient::new(&vm, vm.member());
    parent.write(0, 9, 16);
    let error = format!("{:?}", vm.fork(CloneSpec::new(200)).err().unwrap());
    assert!(
        error.contains("InWorker") && error.contains("ulimit -n"),
        "{error}"
    );
    assert_eq!(vm.family().running().len(), 1);
    let clones = vm.fork(CloneSpec::new(3)).unwrap();
    for clone in &clones {
        let mut clone = Obedient::new(&vm, clone.member());
        clone.expect(0, 9, 16);
        clone.exit();
    }
    parent.exit();
}
