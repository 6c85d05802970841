//! Why a request was not done, in the few kinds that a client can act on.

use std::fmt;

use forkvm::engine::{End, MemberError};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// What kind of failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Kind {
    /// No VM of that name is or was in this family.
    NoSuchVm,
    /// The VM is not in a state for it: it has ended, or is being saved.
    State,
    /// The VM or the host could not do it; the VM goes on as before.
    Refused,
    /// The request is none, or contradicts itself.
    Usage,
    /// It is of another version.
    Version,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::NoSuchVm => "no-such-vm",
            Kind::State => "state",
            Kind::Refused => "refused",
            Kind::Usage => "usage",
            Kind::Version => "version",
        })
    }
}

/// See the module's text.
#[derive(Clone, Debug, PartialEq, Eq, Error, Serialize, Deserialize)]
#[error("{text}")]
pub(crate) struct Failure {
    pub(crate) kind: Kind,
    /// For people.
    pub(crate) text: String,
}

impl Failure {
    pub(super) fn new(kind: Kind, text: impl Into<String>) -> Failure {
        let text = text.into();
        Failure { kind, text }
    }

    pub(super) fn usage(text: impl Into<String>) -> Failure {
        Failure::new(Kind::Usage, text)
    }

    /// The VM `name` has ended.
    pub(super) fn ended(name: &str, end: &str) -> Failure {
        Failure::new(Kind::State, format!("VM {name} has ended: it {end}"))
    }
}

impl From<MemberError> for Failure {
    fn from(error: MemberError) -> Failure {
        match &error {
            MemberError::Ended { name, end } => Failure::ended(name, &End::to_string(end)),
            error => Failure::new(Kind::Refused, with_causes(error)),
        }
    }
}

/// An error with its causes, on one line. A cause that the line before has already told is left out.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let causes = std::iter::successors(error.source(), |error| error.source());
    for cause in causes.map(ToString::to_string) {
        if !text.contains(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
    }
    text
}
