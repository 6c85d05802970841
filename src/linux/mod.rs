//! Linux machines: a [`Vm`] whose guest has forkvm's agent in it, and clones that know who they are.
//!
//! A clone of a Linux machine begins as its parent to the last bit: with its host name, its machine-id, the
//! state of its random numbers and its clock. So no clone is handed to anybody before its agent has taken on
//! an identity of its own ([`introduce`]); one that does not is ended. docs/identity.md goes through the
//! hazards. What is here knows no command line.

mod introduce;
mod parent;
#[cfg(feature = "cli")]
mod template;

use std::io;
use std::ops::Deref;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use forkvm_clone_engine::saved::{OpenMachine, RestoreError};
use forkvm_clone_engine::{
    BootSpec, CloneSpec, Family, FamilyConfig, FreezeKind, Member, MemoryMode,
};
use forkvm_vmm::memory_file::Progress;
use thiserror::Error;

use crate::agent::AgentClient;
use crate::{Error, Vm};

pub use introduce::{IntroduceError, Introduced, Why, introduce};
pub use parent::tell_parent;
#[cfg(feature = "cli")]
pub use template::{MakeError, Step, TemplateSpec, WarmUp, make_template};

/// How long a clone may take to be itself. Where KVM is software its kernel takes a second or more.
pub const INTRODUCTION: Duration = Duration::from_secs(60);

/// How long a machine may take to boot to its agent's answer: an interpreted kernel, on a busy host.
pub const BOOT: Duration = Duration::from_secs(400);

/// A Linux machine whose agent answers. Dropping the handle does not end it.
pub struct LinuxVm {
    vm: Vm,
    introduced: Introduced,
}

impl LinuxVm {
    /// Boots a machine in a family of its own, whose `config` has a vsock, and waits until it is itself.
    /// One that is not so after `patience` is ended.
    pub fn boot(
        spec: BootSpec,
        config: FamilyConfig,
        patience: Duration,
    ) -> Result<LinuxVm, LinuxError> {
        let vm = Vm::boot_with(spec, config)?;
        LinuxVm::meet(vm.family().clone(), vm.member().clone(), patience)
    }

    /// A machine of `family` that was just booted, restored or cloned, once it is itself; it is ended if that
    /// does not come to be within `patience`.
    pub fn meet(
        family: Arc<Family>,
        member: Arc<Member>,
        patience: Duration,
    ) -> Result<LinuxVm, LinuxError> {
        let introduced = introduce(&family, &member, patience)?;
        Ok(LinuxVm {
            vm: Vm { family, member },
            introduced,
        })
    }

    /// A saved machine in `family`, under `name` or its own, once it is itself again.
    pub fn restore(
        family: Arc<Family>,
        machine: OpenMachine,
        name: Option<&str>,
        mode: MemoryMode,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<LinuxVm, LinuxError> {
        let member = family.restore(machine, name, mode, progress)?;
        LinuxVm::meet(family, member, INTRODUCTION)
    }

    /// Forks it as [`Vm::fork`] does. All clones are themselves when this returns; if one cannot be, all of
    /// them are ended. The hooks of this machine have run as well, unless it is paused or a hook fails, which is warned of.
    pub fn fork(&self, spec: CloneSpec) -> Result<Vec<LinuxVm>, LinuxError> {
        let stops = spec.freeze == FreezeKind::Stop;
        let clones = self.vm.fork(spec)?;
        let members: Vec<Arc<Member>> = clones.iter().map(|clone| clone.member().clone()).collect();
        let telling = if stops { None } else { self.tell_of_fork() };
        let met = self.meet_all(&members);
        // One that is paused is told when it runs on.
        if let Some(telling) = telling
            && !self.vm.member().is_paused()
            && let Err(panic) = telling.join()
        {
            std::panic::resume_unwind(panic);
        }
        if met.is_err() {
            members.iter().for_each(|clone| clone.kill());
        }
        met
    }

    fn tell_of_fork(&self) -> Option<thread::JoinHandle<()>> {
        let (parent, agent) = (self.vm.member().clone(), self.agent().clone());
        let tell = move || tell_parent(&parent, &agent, INTRODUCTION);
        let started = thread::Builder::new().name("forked".into()).spawn(tell);
        let warn = |error: &io::Error| {
            let vm = self.vm.member().name();
            tracing::warn!(%error, vm, "no thread to tell it that it was forked");
        };
        started.inspect_err(warn).ok()
    }

    /// At the same time: each waits for its own kernel.
    fn meet_all(&self, members: &[Arc<Member>]) -> Result<Vec<LinuxVm>, LinuxError> {
        let family = self.vm.family();
        thread::scope(|scope| {
            let meet = |member: &Arc<Member>| {
                let (family, member) = (family.clone(), member.clone());
                thread::Builder::new()
                    .name("introduce".into())
                    .spawn_scoped(scope, || LinuxVm::meet(family, member, INTRODUCTION))
                    .map_err(LinuxError::Thread)
            };
            let meetings: Vec<_> = members.iter().map(meet).collect();
            let join = |meeting: thread::ScopedJoinHandle<'_, _>| match meeting.join() {
                Ok(met) => met,
                Err(panic) => std::panic::resume_unwind(panic),
            };
            let met = meetings.into_iter().map(|meeting| meeting.and_then(join));
            // All of them are waited for, whatever came of the first.
            let met: Vec<Result<LinuxVm, LinuxError>> = met.collect();
            met.into_iter().collect()
        })
    }

    /// Its agent.
    pub fn agent(&self) -> &AgentClient {
        &self.introduced.agent
    }

    /// How and when it became itself.
    pub fn introduced(&self) -> &Introduced {
        &self.introduced
    }
}

impl Deref for LinuxVm {
    type Target = Vm;

    fn deref(&self) -> &Vm {
        &self.vm
    }
}

/// Why a Linux machine could not be had.
#[derive(Debug, Error)]
pub enum LinuxError {
    /// The VM could not be booted or forked.
    #[error(transparent)]
    Vm(#[from] Error),
    /// The saved machine could not be restored.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// It did not become itself.
    #[error(transparent)]
    Introduce(#[from] IntroduceError),
    /// No thread to wait for a clone.
    #[error("starting a thread: {0}")]
    Thread(#[source] io::Error),
}
