//! A VM that its owner holds: paused until it is resumed, whatever is asked of it meanwhile.
//!
//! | asked of a held VM | what comes of it |
//! |---|---|
//! | a look, a count of its memory, console input | as of one that runs; it reads the input when it goes on |
//! | a fork, a fork point | made of the instant at which it stands; the clones run, it stays held |
//! | a save | it ends, saved; after one that failed it is still held |
//! | a rewind | it is put back, and held at the beginning of that life |
//! | a kill, its family's end | it ends |
//! | a call of its guest, made before it was held | served when it is resumed; in a clone, and in what was saved, it is answered -EAGAIN as other calls that are pending |
//!
//! So nothing of a held VM changes but by its owner's word, and nothing comes of it that its guest asked for.
//! The host's clock goes on, and the guest's with it.

use forkvm_vmm::{PauseError, PausedVm};
use thiserror::Error;

use super::serving::Serving;
use super::{Ask, Member, MemberError, PAUSE_DEADLINE};

impl Member {
    /// Holds it: it stands until it is [resumed](Member::resume). Of one that is held already nothing is
    /// asked.
    pub fn pause(&self) -> Result<(), MemberError> {
        Ok(self.ask(|reply| Ask::Hold(true, reply))??)
    }

    /// Lets it run on. Nothing happens to one that is not held.
    pub fn resume(&self) -> Result<(), MemberError> {
        Ok(self.ask(|reply| Ask::Hold(false, reply))??)
    }

    /// Whether it is held.
    pub fn is_paused(&self) -> bool {
        self.watch.lock().held
    }
}

/// Why a VM is not held. It runs on.
#[derive(Debug, Error)]
pub enum HoldError {
    /// A vCPU or a device did not stop.
    #[error("it could not be paused, and runs on")]
    Pause(#[from] PauseError),
    /// It lives in a worker, where it failed.
    #[error("worker {process} could not pause it, and it runs on: {why}")]
    InWorker {
        /// The worker.
        process: u32,
        /// What went wrong there.
        why: String,
    },
}

impl Serving {
    /// Holds it, or lets it go.
    pub(super) fn hold(&mut self, held: bool) -> Result<(), HoldError> {
        if held {
            self.vm.pause(PAUSE_DEADLINE).map(PausedVm::hold)?;
        } else {
            self.vm.let_go();
        }
        self.member.watch.hold(held);
        Ok(())
    }
}
