//! The words of `forkvm-guest`.

use std::collections::VecDeque;
use std::ffi::OsString;

use thiserror::Error;

/// How it is called.
pub(super) const USAGE: &str = "\
usage: forkvm-guest fork -n N [--wait] [--stay] [-- CMD ARGS...]
       forkvm-guest id
       forkvm-guest poweroff

fork       forks this machine into N clones. Each clone runs CMD with FORKVM_CLONE_ID set, and ends with its status.
           The parent prints how many clones there are. Without CMD each machine prints its clone id (0: the parent)
  --wait   the parent waits for all clones, and exits with their worst status
  --stay   clones live on when CMD has ended (--exit, the default with CMD, ends them)
id         prints clone id and generation of this machine
poweroff   ends this machine in order (root only)";

/// What is asked for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Action {
    Help,
    Id,
    PowerOff,
    Fork(Fork),
}

/// `fork`
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Fork {
    pub(super) clones: u32,
    pub(super) wait: bool,
    pub(super) exit: bool,
    /// Program and arguments, perhaps none.
    pub(super) command: Vec<OsString>,
}

pub(super) fn parse(words: Vec<OsString>) -> Result<Action, ArgumentError> {
    let mut words = VecDeque::from(words);
    let action = words.pop_front().ok_or(ArgumentError::Nothing)?;
    let action = match action.to_str() {
        Some("fork") => return fork(words).map(Action::Fork),
        Some("id") => Action::Id,
        Some("poweroff") => Action::PowerOff,
        Some("help" | "--help" | "-h") => Action::Help,
        _ => return Err(ArgumentError::Unknown(action)),
    };
    match words.pop_front() {
        None => Ok(action),
        Some(word) => Err(ArgumentError::Unknown(word)),
    }
}

fn fork(mut words: VecDeque<OsString>) -> Result<Fork, ArgumentError> {
    let mut fork = Fork::default();
    let (mut exit, mut stay) = (false, false);
    while let Some(word) = words.pop_front() {
        match word.to_str() {
            Some("-n") => {
                let count = words.pop_front().unwrap_or_default();
                let number = count.to_str().and_then(|count| count.parse().ok());
                fork.clones = number
                    .filter(|number| *number > 0)
                    .ok_or(ArgumentError::Count(count))?;
            }
            Some("--wait") => fork.wait = true,
            Some("--exit") => exit = true,
            Some("--stay") => stay = true,
            Some("--") => fork.command = words.drain(..).collect(),
            _ => return Err(ArgumentError::Unknown(word)),
        }
    }
    if fork.clones == 0 {
        return Err(ArgumentError::Count(OsString::new()));
    }
    if exit && (stay || fork.command.is_empty()) {
        return Err(ArgumentError::Exit);
    }
    fork.exit = !stay && !fork.command.is_empty();
    Ok(fork)
}

/// A command line that means nothing.
#[derive(Debug, Error)]
pub(super) enum ArgumentError {
    #[error("what shall it do?\n{USAGE}")]
    Nothing,
    #[error("{0:?} has no meaning here\n{USAGE}")]
    Unknown(OsString),
    #[error("-n wants the number of clones, 1 or more, not {0:?}")]
    Count(OsString),
    #[error(
        "--exit ends clones when their command has ended: it needs one after --, and no --stay"
    )]
    Exit,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Action, ArgumentError> {
        parse(line.split_whitespace().map(OsString::from).collect())
    }

    #[test]
    fn a_clone_ends_with_its_command_unless_it_shall_stay() {
        let Action::Fork(fork) = parsed("fork -n 4 --wait -- echo -n a").unwrap() else {
            panic!("a fork");
        };
        assert_eq!((fork.clones, fork.wait, fork.exit), (4, true, true));
        assert_eq!(fork.command, ["echo", "-n", "a"]);
        for line in ["fork -n 1 --stay -- a", "fork -n 1"] {
            let Action::Fork(fork) = parsed(line).unwrap() else {
                panic!("a fork");
            };
            assert!(!fork.exit, "{line}");
        }
    }

    #[test]
    fn what_means_nothing_is_refused() {
        for line in [
            "",
            "spoon",
            "id x",
            "fork",
            "fork -n",
            "fork -n 0",
            "fork -n x",
            "fork -n 1 --all",
            "fork -n 1 --exit",
            "fork -n 1 --exit --stay -- a",
        ] {
            assert!(parsed(line).is_err(), "{line}");
        }
    }
}
