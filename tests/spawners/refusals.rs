//! What workers cannot do, and programs that are none: each is refused by name.

use std::process::Command;
use std::sync::Arc;

use forkvm::engine::NoObserver;
use forkvm::engine::limits::Limit;
use forkvm::{CloneSpec, Process, ProcessConfig, WorkerProgram};

use crate::common::{
    Guest, LONG, Obedient, Setup, is_part, leave_mappings, need_kvm, run_part, scaled,
    worker_program, workers_of,
};
use crate::test_worker::{as_worker, serve_watched};

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

/// A fork of `vm` into far too many is refused by its only worker, which names `what` runs out and lives on, as does
/// the clone that it has.
fn expect_full_worker(vm: &Guest, what: &str) {
    vm.wait_ready(LONG).unwrap();
    let mut parent = Obedient::new(vm, vm.member());
    parent.write(0, 9, 16);
    let before = vm.fork(CloneSpec::new(1)).unwrap().remove(0);
    let error = format!("{:?}", vm.fork(CloneSpec::new(200)).err().unwrap());
    assert!(
        error.contains("InWorker") && error.contains(what),
        "{error}"
    );
    assert_eq!(vm.family().running().len(), 2);
    let clones = vm.fork(CloneSpec::new(3)).unwrap();
    for clone in clones.iter().chain([&before]) {
        assert_eq!(clone.member().process(), before.member().process());
        let mut clone = Obedient::new(vm, clone.member());
        clone.expect(0, 9, 16);
        clone.exit();
    }
    parent.exit();
}

#[test]
fn a_worker_that_runs_out_of_descriptors_says_so_and_the_fork_is_rolled_back() {
    need_kvm!();
    run_part(
        "refusals::in_a_process_with_few_descriptors",
        "ulimit -n 80",
    );
}

#[test]
#[ignore = "a_worker_that_runs_out_of_descriptors_says_so_and_the_fork_is_rolled_back runs it"]
fn in_a_process_with_few_descriptors() {
    if is_part("refusals::in_a_process_with_few_descriptors") {
        let vm = Setup::new("job=obey pages=16").spawner(workers_of(1, 500));
        expect_full_worker(&vm.boot(), Limit::Descriptors.mend());
    }
}

/// A stack that cannot be mapped would end the worker.
#[test]
fn a_worker_that_runs_out_of_mappings_says_so_and_its_clones_run_on() {
    need_kvm!();
    let program = as_worker("refusals::a_worker_with_few_mappings", "true");
    let config = ProcessConfig {
        ready: 1,
        clones_per_worker: 500,
        ..ProcessConfig::new(program)
    };
    let vm = Setup::new("job=obey pages=16").spawner(Arc::new(Process::start(config).unwrap()));
    expect_full_worker(&vm.boot(), Limit::Mappings.mend());
}

#[test]
#[ignore = "a_worker_that_runs_out_of_mappings_says_so_and_its_clones_run_on runs it as a worker"]
fn a_worker_with_few_mappings() {
    if is_part("refusals::a_worker_with_few_mappings") {
        leave_mappings(scaled(1000, 600) as usize);
        serve_watched(Arc::new(NoObserver));
    }
}
