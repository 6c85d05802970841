//! The engine dies: its workers end themselves, and nothing runs on that nobody can reach.

use std::env;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::thread;

use forkvm::CloneSpec;
use forkvm::engine::spawn::Spawner;

use crate::common::{LONG, Setup, need_kvm, workers_of};
use crate::spread::{is_gone, wait_until};

/// Set for the part of a test that is killed.
const KILLED: &str = "FORKVM_TEST_ENGINE_KILLED";

#[test]
fn workers_end_themselves_when_their_engine_is_killed() {
    need_kvm!();
    let mut engine = Command::new(env::current_exe().unwrap())
        .args(["--exact", "engine_killed::fork_and_wait_to_be_killed"])
        .args(["--ignored", "--nocapture"])
        .env(KILLED, "1")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(engine.stdout.take().unwrap()).lines();
    let mut workers: Vec<u32> = Vec::new();
    for line in lines {
        let line = line.unwrap();
        if let Some(worker) = line.strip_prefix("worker ") {
            workers.push(worker.parse().unwrap());
        }
        if line == "forked" {
            break;
        }
    }
    assert_eq!(workers.len(), 3);
    assert!(workers.iter().all(|worker| !is_gone(*worker)));
    engine.kill().unwrap();
    engine.wait().unwrap();
    for worker in workers {
        wait_until("the worker ends itself", || is_gone(worker));
    }
}

#[test]
#[ignore = "workers_end_themselves_when_their_engine_is_killed runs it"]
fn fork_and_wait_to_be_killed() {
    if env::var_os(KILLED).is_none() {
        println!("skipped: only a part of another test");
        return;
    }
    let process = workers_of(3, 64);
    let workers = process.processes();
    let vm = Setup::new("job=spin").spawner(process).boot();
    vm.wait_ready(LONG).unwrap();
    // Two of the three have clones, which keep their vCPUs busy.
    let clones = vm.fork(CloneSpec::new(2)).unwrap();
    // What the harness has begun to print has no end of line.
    println!();
    workers
        .iter()
        .for_each(|worker| println!("worker {worker}"));
    println!("forked");
    thread::sleep(LONG);
    drop(clones);
}
