//! Errors at the end of a command: the chain of causes for people, and the exit code.

use std::process::ExitCode;

use forkvm::engine::UserfaultError;
use forkvm::vmm::KvmError;
use forkvm_linux_image::BuildError;
use serde_json::{Value, json};
use thiserror::Error;

use super::control::protocol::Failure;

/// The options contradict each other, or what they name.
#[derive(Debug, Error)]
#[error("{0}")]
pub(crate) struct Usage(pub(crate) String);

/// Prints an error with its causes, one per line, and says with which exit code to end.
pub(crate) fn report(error: &anyhow::Error) -> ExitCode {
    let mut lines = lines(error).into_iter();
    eprintln!("error: {}", lines.next().unwrap_or_default());
    lines.for_each(|cause| eprintln!("  because: {cause}"));
    let is_usage = |failure: &Failure| failure.is_usage();
    if error.is::<Usage>() || error.downcast_ref().is_some_and(is_usage) {
        eprintln!("For more information, try '--help'.");
        return ExitCode::from(2);
    }
    // Which names what is missing, and the remedy.
    if lacks_build_tools(error) {
        return ExitCode::from(3);
    }
    if host_lacks(error) {
        eprintln!("`forkvm doctor` says what this host lacks, and how to mend it.");
        return ExitCode::from(3);
    }
    ExitCode::from(1)
}

/// An error as [`report`] prints it, for programs.
pub(crate) fn to_json(error: &anyhow::Error) -> Value {
    let mut lines = lines(error).into_iter();
    json!({ "error": lines.next().unwrap_or_default(), "causes": lines.collect::<Vec<_>>() })
}

/// Tells of an error after which the command goes on.
pub(crate) fn warn(error: &anyhow::Error) {
    eprintln!("forkvm: {}", lines(error).join(": "));
}

/// The error and its causes. A cause that the line before has already told is left out.
fn lines(error: &anyhow::Error) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for cause in error.chain().map(ToString::to_string) {
        if lines.last().is_none_or(|last| !last.contains(&cause)) {
            lines.push(cause);
        }
    }
    lines
}

fn lacks_build_tools(error: &anyhow::Error) -> bool {
    matches!(
        error.downcast_ref::<BuildError>(),
        Some(BuildError::Lacking(_))
    )
}

fn host_lacks(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause.is::<KvmError>()
            || matches!(
                cause.downcast_ref::<UserfaultError>(),
                Some(UserfaultError::Unavailable(_))
            )
            || matches!(
                cause.downcast_ref::<forkvm::Error>(),
                Some(forkvm::Error::Kvm(_))
            )
    })
}
