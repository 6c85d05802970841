//! Hooks: programs that do at a fork what only the application knows, in parent and clone.
//!
//! Each executable of the directory runs in the order of names, with `parent` or `clone` as its argument and
//! FORKVM_CLONE_ID and FORKVM_GENERATION in its environment. Its output goes where the agent's goes.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use forkvm_agent_protocol::{Exit, Generation};
use thiserror::Error;

use super::Role;
use crate::init::PATH;
use crate::reaper;

/// A directory of hooks.
pub(super) struct Hooks {
    directory: PathBuf,
    limit: Duration,
}

impl Hooks {
    /// Each hook of `directory` has `limit`.
    pub(super) fn new(directory: PathBuf, limit: Duration) -> Hooks {
        Hooks { directory, limit }
    }

    /// Runs all of them; stops at the first that fails.
    pub(super) fn run(&self, role: Role, generation: Generation) -> Result<Vec<String>, HookError> {
        let mut ran = Vec::new();
        for hook in self.list()? {
            self.run_one(&hook, role, generation)?;
            ran.push(name_of(&hook));
        }
        Ok(ran)
    }

    /// Paths, by name. A directory that is not there has no hooks.
    fn list(&self) -> Result<Vec<PathBuf>, HookError> {
        let fail = |source| HookError::List {
            directory: self.directory.clone(),
            source,
        };
        let entries = match fs::read_dir(&self.directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(fail)?,
        };
        let mut hooks = Vec::new();
        for entry in entries {
            let path = entry.map_err(fail)?.path();
            let metadata = fs::metadata(&path).map_err(fail)?;
            if metadata.is_file() && metadata.permissions().mode() & 0o111 != 0 {
                hooks.push(path);
            }
        }
        hooks.sort();
        Ok(hooks)
    }

    fn run_one(&self, hook: &Path, role: Role, generation: Generation) -> Result<(), HookError> {
        let (role, clone_id) = match role {
            Role::Parent => ("parent", 0),
            Role::Clone(number) => ("clone", number),
        };
        let mut command = Command::new(hook);
        command
            .arg(role)
            .env_clear()
            .env("PATH", PATH)
            .env("FORKVM_CLONE_ID", clone_id.to_string())
            .env("FORKVM_GENERATION", generation.to_string())
            .current_dir("/")
            .stdin(Stdio::null())
            .process_group(0);
        let name = name_of(hook);
        let spawned = reaper::spawn(&mut command).map_err(|source| HookError::Start {
            name: name.clone(),
            source,
        })?;
        match spawned.child.ended().wait(Some(self.limit)) {
            Some(Exit::Code(0)) => Ok(()),
            Some(exit) => Err(HookError::Failed {
                name,
                status: exit.status(),
            }),
            None => {
                spawned.child.signal(rustix::process::Signal::KILL);
                Err(HookError::Late {
                    name,
                    milliseconds: self.limit.as_millis(),
                })
            }
        }
    }
}

fn name_of(hook: &Path) -> String {
    let name = hook.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// A hook that fails fails the identification.
#[derive(Debug, Error)]
pub enum HookError {
    /// The directory.
    #[error("reading the fork hooks in {}", directory.display())]
    List {
        /// Where they should be.
        directory: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// No program.
    #[error("the fork hook {name:?} cannot be run")]
    Start {
        /// Its file.
        name: String,
        /// Why it failed.
        source: io::Error,
    },
    /// It says so.
    #[error(
        "the fork hook {name:?} failed with status {status}: its output is on the machine's console"
    )]
    Failed {
        /// Its file.
        name: String,
        /// 128 and more: a signal.
        status: u8,
    },
    /// It was killed.
    #[error("the fork hook {name:?} took longer than {milliseconds} ms and was killed")]
    Late {
        /// Its file.
        name: String,
        /// What it had.
        milliseconds: u128,
    },
}

#[cfg(test)]
mod tests {
    use std::sync::{Mutex, MutexGuard, PoisonError};

    use super::*;

    /// A program that another thread starts meanwhile would hold a script open for writing, and it could not be run.
    static ALONE: Mutex<()> = Mutex::new(());

    struct Directory(
        tempfile::TempDir,
        #[expect(dead_code)] MutexGuard<'static, ()>,
    );

    impl Directory {
        fn new() -> Directory {
            let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
            reaper::start().unwrap();
            Directory(tempfile::tempdir().unwrap(), alone)
        }

        fn hook(&self, name: &str, script: &str, mode: u32) {
            let path = self.0.path().join(name);
            fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        }

        fn run(&self, role: Role, limit: Duration) -> Result<Vec<String>, HookError> {
            Hooks::new(self.0.path().join("."), limit).run(role, Generation([7; 16]))
        }

        fn said(&self) -> String {
            fs::read_to_string(self.0.path().join("said")).unwrap()
        }
    }

    const AMPLE: Duration = Duration::from_secs(60);

    #[test]
    fn executables_run_in_the_order_of_their_names_and_hear_who_they_are() {
        let directory = Directory::new();
        let say = "echo \"$0 $1 $FORKVM_CLONE_ID $FORKVM_GENERATION\" | sed 's:.*/::' >> \"$(dirname \"$0\")/said\"";
        directory.hook("20-b", say, 0o755);
        directory.hook("10-a", say, 0o755);
        directory.hook("30-off", say, 0o644);
        assert_eq!(
            directory.run(Role::Clone(3), AMPLE).unwrap(),
            ["10-a", "20-b"]
        );
        let seven = "07".repeat(16);
        assert_eq!(
            directory.said(),
            format!("10-a clone 3 {seven}\n20-b clone 3 {seven}\n")
        );
        assert_eq!(directory.run(Role::Parent, AMPLE).unwrap().len(), 2);
        assert!(directory.said().contains("10-a parent 0"));
    }

    #[test]
    fn a_hook_that_fails_is_named_and_none_runs_after_it() {
        let directory = Directory::new();
        directory.hook("1-fails", "exit 9", 0o755);
        directory.hook("2-never", "touch \"$(dirname \"$0\")/said\"", 0o755);
        let text = directory
            .run(Role::Clone(1), AMPLE)
            .unwrap_err()
            .to_string();
        assert!(text.contains("1-fails") && text.contains('9'), "{text}");
        assert!(!directory.0.path().join("said").exists());
    }

    #[test]
    fn a_hook_that_takes_too_long_is_killed_and_named() {
        let directory = Directory::new();
        directory.hook("slow", "while :; do :; done", 0o755);
        let limit = Duration::from_millis(50);
        let error = directory.run(Role::Clone(1), limit).unwrap_err();
        assert!(
            matches!(&error, HookError::Late { name, .. } if name == "slow"),
            "{error}"
        );
    }

    #[test]
    fn a_directory_that_is_not_there_has_no_hooks() {
        let hooks = Hooks::new("/nowhere/at/all".into(), AMPLE);
        let ran = hooks.run(Role::Parent, Generation([1; 16]));
        assert!(ran.unwrap().is_empty());
    }
}
