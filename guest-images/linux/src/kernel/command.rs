//! Programs of the kernel's build: run one after the other, heard line by line, ended when told to.
//!
//! Each runs in a process group of its own, so that all that it started ends with it. All that it prints
//! goes to one log; the last lines come back when it fails.

use std::collections::VecDeque;
use std::env;
use std::fs::File;
use std::io::{self, BufRead, BufReader, PipeReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group, test_kill_process_group};
use thiserror::Error;

use super::KernelError;
use crate::watch::Watch;

/// What programs of the build see of the environment. The rest stays outside: ARCH, KCFLAGS or the flags
/// of a make that called forkvm would make another kernel.
const ENVIRONMENT: &[&str] = &["PATH", "HOME", "TMPDIR"];
/// How many of its last lines come with the error of a program.
const LAST_LINES: usize = 20;
/// How long programs that were killed are waited for. A process that nobody reaps seems to be there for ever.
const OTHERS_END: Duration = Duration::from_secs(1);
/// How often somebody who waits is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// A command that will run in `directory`, with no input, and the same wherever forkvm is called from.
pub(crate) fn new(program: &str, directory: &Path) -> Command {
    let mut command = Command::new(program);
    command
        .current_dir(directory)
        .stdin(Stdio::null())
        .env_clear()
        .env("LC_ALL", "C");
    for name in ENVIRONMENT {
        if let Some(value) = env::var_os(name) {
            command.env(name, value);
        }
    }
    command
}

/// Runs commands; knows where their output goes.
pub(crate) struct Runner {
    path: PathBuf,
    log: File,
}

impl Runner {
    pub(crate) fn new(path: PathBuf, log: File) -> Runner {
        Runner { path, log }
    }

    /// Runs a command to its end. `heed` is called with each line that it prints, and with `None` now
    /// and then.
    pub(crate) fn run(
        &self,
        mut command: Command,
        watch: &mut dyn Watch,
        mut heed: impl FnMut(&mut dyn Watch, Option<&str>),
    ) -> Result<(), KernelError> {
        let shown = shown(&command);
        let starting = |source| CommandError::Start {
            command: shown.clone(),
            source,
        };
        self.log(&format!("+ {shown}"))?;
        let (output, input) = io::pipe().map_err(starting)?;
        command
            .stdout(input.try_clone().map_err(starting)?)
            .stderr(input)
            .process_group(0);
        let mut group = Group(Some(command.spawn().map_err(starting)?));
        // It holds the pipe's other end, which would never close.
        drop(command);
        let lines = lines(output).map_err(starting)?;
        let mut last = VecDeque::new();
        loop {
            if watch.stop() {
                return Err(KernelError::Stopped);
            }
            match lines.recv_timeout(LOOK_EVERY) {
                Ok(line) => {
                    self.log(&line)?;
                    heed(watch, Some(&line));
                    if last.len() == LAST_LINES {
                        last.pop_front();
                    }
                    last.push_back(line);
                }
                Err(RecvTimeoutError::Timeout) => heed(watch, None),
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        let status = group.wait().map_err(starting)?;
        if status.success() {
            return Ok(());
        }
        let last: Vec<_> = last.iter().map(|line| format!("\n    {line}")).collect();
        Err(CommandError::Failed {
            command: shown,
            status,
            last: last.concat(),
            log: self.path.clone(),
        }
        .into())
    }

    fn log(&self, line: &str) -> Result<(), CommandError> {
        writeln!(&self.log, "{line}").map_err(|source| CommandError::Log {
            path: self.path.clone(),
            source,
        })
    }
}

/// A program and all that it started; killed when it is not waited for.
struct Group(Option<Child>);

impl Group {
    fn wait(&mut self) -> io::Result<ExitStatus> {
        match self.0.take() {
            Some(mut child) => child.wait(),
            None => Err(io::Error::other("it was waited for already")),
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let Some(mut child) = self.0.take() else {
            return;
        };
        let group = Pid::from_child(&child);
        // Nothing that it could tidy up is kept.
        if let Err(error) = kill_process_group(group, Signal::KILL) {
            tracing::warn!(%error, "a program of the build could not be ended");
        }
        if let Err(error) = child.wait() {
            tracing::warn!(%error, "a program of the build could not be waited for");
        }
        // The others are not ours to wait for, and may be about to write into a directory that goes next.
        let start = Instant::now();
        while test_kill_process_group(group).is_ok() && start.elapsed() < OTHERS_END {
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// What comes out of a pipe, line by line, from a thread that ends with the pipe.
fn lines(output: PipeReader) -> io::Result<Receiver<String>> {
    let (sender, receiver) = channel();
    let read = move || {
        let mut output = BufReader::new(output);
        let mut line = Vec::new();
        // A compiler quotes source, which need not be UTF-8.
        while output
            .read_until(b'\n', &mut line)
            .is_ok_and(|bytes| bytes > 0)
        {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            if sender.send(text).is_err() {
                return;
            }
            line.clear();
        }
    };
    thread::Builder::new().name("output".into()).spawn(read)?;
    Ok(receiver)
}

fn shown(command: &Command) -> String {
    let words = [command.get_program()]
        .into_iter()
        .chain(command.get_args());
    let words: Vec<_> = words.map(|word| word.to_string_lossy()).collect();
    words.join(" ")
}

/// A program of the build did not do what it should.
#[derive(Debug, Error)]
pub enum CommandError {
    /// It never ran.
    #[error("running `{command}`")]
    Start {
        /// With its arguments.
        command: String,
        /// Why it failed.
        source: io::Error,
    },
    /// It ran, and failed.
    #[error("`{command}` failed ({status}); its last lines:{last}\nthe whole output is in {}", log.display())]
    Failed {
        /// With its arguments.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// What it printed last.
        last: String,
        /// What it, and those before it, printed.
        log: PathBuf,
    },
    /// Probably a full disk.
    #[error("writing the log {}", path.display())]
    Log {
        /// The log.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tempfile::{TempDir, tempdir};

    use super::*;
    use crate::tests::StopAfter;

    fn runner(dir: &TempDir) -> Runner {
        let path = dir.path().join("log");
        let file = File::create(&path).unwrap();
        Runner::new(path, file)
    }

    fn shell(dir: &TempDir, script: &str) -> Command {
        let mut command = new("sh", dir.path());
        command.args(["-c", script]);
        command
    }

    #[test]
    fn lines_of_both_outputs_are_heard_and_logged() {
        let dir = tempdir().unwrap();
        let mut heard = Vec::new();
        runner(&dir)
            .run(
                shell(&dir, "echo one; echo two >&2; printf '\\377 three'"),
                &mut (),
                |_, line| heard.extend(line.map(str::to_owned)),
            )
            .unwrap();
        assert_eq!(heard, ["one", "two", "\u{fffd} three"]);
        let log = fs::read_to_string(dir.path().join("log")).unwrap();
        assert!(
            log.starts_with("+ sh -c") && log.contains("\ntwo\n"),
            "{log}"
        );
    }

    #[test]
    fn a_failure_tells_the_last_lines_and_where_all_are() {
        let dir = tempdir().unwrap();
        let script = "i=0; while [ $i -lt 50 ]; do i=$((i+1)); echo line $i.; done; exit 7";
        let error = runner(&dir)
            .run(shell(&dir, script), &mut (), |_, _| {})
            .unwrap_err();
        let text = error.to_string();
        assert!(text.contains("exit status: 7"), "{text}");
        assert!(
            text.contains("line 50.") && text.contains("line 31."),
            "{text}"
        );
        assert!(!text.contains("line 30."), "{text}");
        let log = dir.path().join("log");
        assert!(text.contains(&log.display().to_string()), "{text}");
        assert!(fs::read_to_string(log).unwrap().contains("line 1."));
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let dir = tempdir().unwrap();
        let command = new("no-such-program", dir.path());
        let error = runner(&dir).run(command, &mut (), |_, _| {}).unwrap_err();
        assert!(error.to_string().contains("no-such-program"), "{error}");
    }

    #[test]
    fn the_caller_s_environment_makes_no_other_kernel() {
        let dir = tempdir().unwrap();
        let mut heard = String::new();
        runner(&dir)
            .run(shell(&dir, "env"), &mut (), |_, line| {
                heard.extend(line.map(|line| format!("{line}\n")));
            })
            .unwrap();
        // Cargo sets it for every test.
        assert!(!heard.contains("CARGO"), "{heard}");
        assert!(
            heard.contains("PATH=") && heard.contains("LC_ALL=C"),
            "{heard}"
        );
    }

    #[test]
    fn a_stop_ends_the_program_and_what_it_started() {
        let dir = tempdir().unwrap();
        let start = Instant::now();
        // The shell's child would write the file.
        let script = "(sleep 2; touch late) & sleep 60";
        let error = runner(&dir)
            .run(shell(&dir, script), &mut StopAfter::new(3), |_, _| {})
            .unwrap_err();
        assert!(matches!(error, KernelError::Stopped), "{error}");
        assert!(start.elapsed() < Duration::from_secs(30));
        thread::sleep(Duration::from_secs(3));
        assert!(!dir.path().join("late").exists());
    }
}
