//! The engine dies: its workers end themselves, and nothing runs on that nobody can reach.

use std::env;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
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
    let engine = Engine::start("engine_killed::fork_and_wait_to_be_killed", "forked");
    assert_eq!(engine.workers.len(), 3);
    engine.kill();
}

/// A process that runs a part of a test and is killed.
pub(crate) struct Engine {
    process: Child,
    /// Its workers, which it has named in lines `worker PID`.
    pub(crate) workers: Vec<u32>,
    /// All that it has said.
    pub(crate) lines: Vec<String>,
}

impl Engine {
    /// Runs `part`, a test that is ignored, until it says `last`.
    pub(crate) fn start(part: &str, last: &str) -> Engine {
        let mut process = Command::new(env::current_exe().unwrap())
            .args(["--exact", part, "--ignored", "--nocapture"])
            .env(KILLED, "1")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let lines = lines.map(Result::unwrap).take_while(|line| line != last);
        let lines: Vec<String> = lines.collect();
        let workers = lines.iter().filter_map(|line| line.strip_prefix("worker "));
        Engine {
            workers: workers.map(|worker| worker.parse().unwrap()).collect(),
            process,
            lines,
        }
    }

    /// Whether this process is one.
    pub(crate) fn is_this_process() -> bool {
        let is_one = env::var_os(KILLED).is_some();
        if !is_one {
            println!("skipped: only a part of another test");
        }
        is_one
    }

    pub(crate) fn id(&self) -> u32 {
        self.process.id()
    }

    /// Kills it; its workers end themselves.
    pub(crate) fn kill(mut self) {
        assert!(self.workers.iter().all(|worker| !is_gone(*worker)));
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        for worker in self.workers {
            wait_until("the worker ends itself", || is_gone(worker));
        }
    }
}

#[test]
#[ignore = "workers_end_themselves_when_their_engine_is_killed runs it"]
fn fork_and_wait_to_be_killed() {
    if !Engine::is_this_process() {
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
