//! Workers that are this test binary, so that a test says what happens in them.

use std::env;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use forkvm::engine::{ForkPoint, Member, Observer, Phase, Vetoed};
use forkvm::vmm::PausedVm;
use forkvm::{Process, ProcessConfig, WorkerProgram, worker};
use rustix::process::{Signal, getpid, kill_process};
use tempfile::TempDir;

use crate::common::{is_part, part_arguments};

/// This binary, in which the ignored test `part` becomes a worker after the shell did `before`.
pub(crate) fn as_worker(part: &str, before: &str) -> WorkerProgram {
    WorkerProgram {
        path: "/bin/sh".into(),
        args: part_arguments(part, before),
    }
}

/// Becomes a worker that `observer` watches.
pub(crate) fn serve_watched(observer: Arc<dyn Observer>) {
    let socket = io::stdin().as_fd().try_clone_to_owned().unwrap();
    let Err(error) = worker::serve_watched(socket, observer);
    panic!("it is no worker: {error}");
}

/// Where workers die.
const MARKS: &str = "FORKVM_TEST_MARKS";

/// Most times that a phase may pass before a worker dies at it.
const MOST_TIMES: u32 = 4;

/// As many are ready at any time, and take turns.
pub(crate) const WORKERS: usize = 2;

/// One of some workers dies at a phase of its own, in the middle of what it does there.
///
/// There are as many marks as the phase has to begin. Whoever begins it takes one away, and whoever took the
/// last one dies.
pub(crate) struct Deaths(TempDir);

impl Deaths {
    pub(crate) fn new() -> Deaths {
        Deaths(tempfile::tempdir().unwrap())
    }

    /// A spawner with workers that may die so.
    pub(crate) fn workers(&self) -> Arc<Process> {
        let marks = format!("export {MARKS}={}", self.0.path().display());
        let program = as_worker("test_worker::a_worker_that_dies_where_it_is_told", &marks);
        let config = ProcessConfig {
            ready: WORKERS,
            ..ProcessConfig::new(program)
        };
        Arc::new(Process::start(config).unwrap())
    }

    /// Whoever begins `phase` for the `time`th time in all workers together dies.
    pub(crate) fn arm(&self, phase: Phase, time: u32) {
        assert!(time <= MOST_TIMES);
        for left in 0..time {
            File::create(mark(self.0.path(), phase, left)).unwrap();
        }
    }

    /// Whether it has not happened yet.
    pub(crate) fn is_armed(&self) -> bool {
        fs::read_dir(self.0.path()).unwrap().count() > 0
    }
}

fn mark(marks: &Path, phase: Phase, left: u32) -> PathBuf {
    marks.join(format!("{phase}-{left}"))
}

/// In the worker.
struct Dying {
    marks: PathBuf,
}

impl Observer for Dying {
    fn enter(&self, phase: Phase, _paused: Option<&PausedVm<'_>>) -> Result<(), Vetoed> {
        let took = |left: &u32| fs::remove_file(mark(&self.marks, phase, *left)).is_ok();
        if (0..MOST_TIMES).rev().find(took) == Some(0) {
            kill_process(getpid(), Signal::KILL).unwrap();
        }
        Ok(())
    }

    fn leave(&self, _phase: Phase, _took: Duration) {}

    fn parent_paused(&self, _took: Duration) {}

    fn forked(&self, _point: &Arc<ForkPoint>, _clones: &[Arc<Member>]) {}
}

#[test]
#[ignore = "tests with workers that die where they are told run it as a worker"]
fn a_worker_that_dies_where_it_is_told() {
    if is_part("test_worker::a_worker_that_dies_where_it_is_told") {
        let marks = env::var_os(MARKS).unwrap().into();
        serve_watched(Arc::new(Dying { marks }));
    }
}
