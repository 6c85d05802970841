//! A Linux machine becomes a template: it is booted, made warm, and saved.
//!
//! How a template is kept is [`crate::templates`]'; `forkvm template create` and the demo of Linux guests make theirs here.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use forkvm_clone_engine::{BootSpec, End, Family, MemberError};
use forkvm_vmm::boot::Payload;
use serde_json::{Value, json};
use thiserror::Error;

use super::{LinuxError, LinuxVm};
use crate::Error;
use crate::templates::{Draft, Template, TemplateError};

/// What a template is made of.
pub struct TemplateSpec {
    /// What is booted.
    pub boot: BootSpec,
    /// The files behind its disks, which must stay as they are.
    pub disks: Vec<PathBuf>,
    /// How long its agent may take to answer.
    pub patience: Duration,
    /// What makes it warm, as its manifest tells it: a program and its arguments.
    pub warmed_by: Vec<String>,
}

/// What is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Until the agent answers.
    Boot,
    /// What the user wants to have happened before.
    WarmUp,
    /// To disk.
    Save,
    /// All files that it is made of are read.
    Hash,
}

impl Step {
    /// For people.
    pub fn as_str(self) -> &'static str {
        match self {
            Step::Boot => "booting",
            Step::WarmUp => "running a program",
            Step::Save => "saving",
            Step::Hash => "hashing",
        }
    }
}

/// What is done in the machine before it is saved.
pub type WarmUp<'a> =
    &'a mut dyn FnMut(&LinuxVm) -> Result<(), Box<dyn std::error::Error + Send + Sync>>;

/// Makes the template that `draft` began, in a `family` with a vsock whose saver saves to [`Draft::machine`]. The
/// machine has ended then, or is the caller's to end where this fails. `at` hears of each step.
///
/// # Errors
/// The step that failed; nothing of the template is left.
pub fn make_template(
    family: &Arc<Family>,
    draft: Draft,
    spec: TemplateSpec,
    warm_up: WarmUp<'_>,
    at: &mut dyn FnMut(Step),
) -> Result<Template, MakeError> {
    let start = Instant::now();
    let mut files = spec.disks;
    let mut about = json!({
        "cmdline": spec.boot.cmdline,
        "memory_mib": spec.boot.memory_mib,
        "vcpus": spec.boot.vcpus,
        "program": spec.warmed_by,
    });
    if let Payload::Kernel { kernel, initrd } = &spec.boot.payload {
        about["kernel"] = json!(kernel);
        files.push(kernel.clone());
        files.extend(initrd.clone());
    }
    at(Step::Boot);
    let vm = family.boot(spec.boot).map_err(Error::from)?;
    let vm = LinuxVm::meet(family.clone(), vm, spec.patience)?;
    about["boot_ms"] = millis(start);
    at(Step::WarmUp);
    warm_up(&vm).map_err(MakeError::WarmUp)?;
    at(Step::Save);
    vm.member().save().map_err(MakeError::Save)?;
    let end = vm.join().end;
    if end != End::Saved {
        return Err(MakeError::NotSaved(end));
    }
    about["template_ms"] = millis(start);
    at(Step::Hash);
    Ok(draft.finish(about, &files)?)
}

fn millis(start: Instant) -> Value {
    json!(start.elapsed().as_millis() as u64)
}

/// Why there is no template.
#[derive(Debug, Error)]
pub enum MakeError {
    /// The machine did not come up.
    #[error(transparent)]
    Linux(#[from] LinuxError),
    /// What was to be done in it failed.
    #[error("making the machine warm")]
    WarmUp(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// It could not be saved.
    #[error("saving the machine")]
    Save(#[source] MemberError),
    /// It ended otherwise.
    #[error("the machine {0} as it was saved")]
    NotSaved(End),
    /// It was saved and is no template.
    #[error(transparent)]
    Template(#[from] TemplateError),
}

impl From<Error> for MakeError {
    fn from(error: Error) -> MakeError {
        MakeError::Linux(error.into())
    }
}
