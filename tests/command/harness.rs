//! Programs under test: to be run to their end, or to be met while they run.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::common::LONG;

/// What the parent of the guest's job `blk-verify` says once its fork is over.
pub(crate) const FORKED: &str = "blk-verify forked clone=0";

/// The command, run to its end.
pub(crate) fn forkvm(dir: &Path, args: &[&str]) -> Ended {
    Running::start(dir, args).wait()
}

/// The same with another runtime directory than `dir`.
pub(crate) fn forkvm_at(dir: &Path, runtime_dir: &Path, args: &[&str]) -> Ended {
    Running::start_at(dir, runtime_dir, args, Stdio::null()).wait()
}

/// A program that has ended.
pub(crate) struct Ended(Output);

impl Ended {
    /// Exit code; a signal fails the test.
    pub(crate) fn code(&self) -> i32 {
        let code = self.0.status.code();
        code.unwrap_or_else(|| panic!("{}\n{}", self.0.status, self.stderr()))
    }

    pub(crate) fn stdout(&self) -> String {
        String::from_utf8_lossy(&self.0.stdout).into_owned()
    }

    pub(crate) fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.0.stderr).into_owned()
    }

    /// Requires the exit code, and words on standard error.
    #[track_caller]
    pub(crate) fn expect(&self, code: i32, said: &str) -> &Ended {
        let stderr = self.stderr();
        assert_eq!(self.code(), code, "{stderr}");
        assert!(stderr.contains(said), "{said:?} is not in {stderr}");
        self
    }
}

/// A program that runs; killed when the test fails.
pub(crate) struct Running {
    child: Option<Child>,
    /// A file, so that it can be read while the program writes it.
    stdout: fs::File,
}

impl Running {
    pub(crate) fn start(dir: &Path, args: &[&str]) -> Running {
        Running::start_with(dir, args, Stdio::null())
    }

    pub(crate) fn start_with(dir: &Path, args: &[&str], stdin: Stdio) -> Running {
        // Machines of one name do not meet, unless they are of one test.
        Running::start_at(dir, dir, args, stdin)
    }

    fn start_at(dir: &Path, runtime_dir: &Path, args: &[&str], stdin: Stdio) -> Running {
        let stdout = tempfile::tempfile().unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_forkvm"))
            .args(args)
            .current_dir(dir)
            .env_remove("FORKVM_LOG")
            .env("XDG_RUNTIME_DIR", runtime_dir)
            .env("XDG_DATA_HOME", runtime_dir.join("data"))
            // Whatever images the user has.
            .env("XDG_CACHE_HOME", runtime_dir.join("cache"))
            .stdin(stdin)
            .stdout(stdout.try_clone().unwrap())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Running {
            child: Some(child),
            stdout,
        }
    }

    pub(crate) fn child(&mut self) -> &mut Child {
        self.child.as_mut().unwrap()
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    /// What it has said on standard output.
    pub(crate) fn said(&self) -> String {
        String::from_utf8_lossy(&so_far(&self.stdout)).into_owned()
    }

    /// Waits until the VM that was started has said these words. What a guest's parent says after a fork
    /// shows that the fork is over.
    pub(crate) fn wait_until_said(&mut self, words: &str) -> &mut Running {
        let stdout = self.stdout.try_clone().unwrap();
        // On a slow host whole lines of clones may stand in the middle of one of its own.
        let said = |text: &str| -> String {
            let lines = text.lines().filter(|line| !line.starts_with('['));
            lines.collect()
        };
        self.wait_until(words, || {
            said(&String::from_utf8_lossy(&so_far(&stdout))).contains(words)
        });
        self
    }

    /// Waits until it serves its first VM, and a moment more: before that, a signal ends the program at once.
    pub(crate) fn wait_for_vm(&mut self) -> &mut Running {
        let tasks = PathBuf::from(format!("/proc/{}/task", self.child().id()));
        let serves = || {
            let tasks = fs::read_dir(&tasks).into_iter().flatten().flatten();
            let mut names =
                tasks.filter_map(|task| fs::read_to_string(task.path().join("comm")).ok());
            // The thread that serves a VM is there once its state is; its vCPUs are before.
            names.any(|name| name.starts_with("vm-"))
        };
        self.wait_until("a VM runs", serves);
        thread::sleep(Duration::from_millis(50));
        self
    }

    /// Waits for a condition, as long as the program runs.
    pub(crate) fn wait_until(&mut self, what: &str, is_so: impl Fn() -> bool) {
        let start = Instant::now();
        while !is_so() {
            if let Some(status) = self.child().try_wait().unwrap() {
                let ended = self.child.take().unwrap().wait_with_output().unwrap();
                let stderr = String::from_utf8_lossy(&ended.stderr);
                panic!("ended with {status} before: {what}\n{stderr}");
            }
            assert!(start.elapsed() < LONG, "not within {LONG:?}: {what}");
            thread::sleep(Duration::from_millis(2));
        }
    }

    pub(crate) fn signal(&mut self, name: &str) -> &mut Running {
        let pid = self.child().id().to_string();
        let killed = Command::new("/bin/kill")
            .args(["-s", name, &pid])
            .status()
            .unwrap();
        assert!(killed.success());
        self
    }

    pub(crate) fn wait(mut self) -> Ended {
        let mut output = self.child.take().unwrap().wait_with_output().unwrap();
        output.stdout = so_far(&self.stdout);
        Ended(output)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}

/// Waits for a condition.
pub(crate) fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < LONG, "not within {LONG:?}: {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// What a file holds. Read by offset: whoever writes it may do so at the position that both share.
fn so_far(file: &fs::File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// A raw disk of `mib` MiB of zeros.
pub(crate) fn disk(dir: &Path, name: &str, mib: u64) -> PathBuf {
    let path = dir.join(name);
    fs::File::create(&path).unwrap().set_len(mib << 20).unwrap();
    path
}

/// Names of what is in a directory, sorted.
pub(crate) fn names_in(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}
