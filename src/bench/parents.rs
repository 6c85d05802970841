//! Parents that are frozen again and again in one way.
//!
//! One VM serves all repetitions, but where a VM knows the freeze only once (remap): then each has a
//! VM that was freshly booted for it. For the scenarios `fork` and `pause`.

use forkvm_clone_engine::{FreezeKind, MemoryMode};

use super::measure::BenchError;
use super::subject::{Subject, SubjectSpec};

/// See the module's text.
pub struct Parents {
    freeze: FreezeKind,
    spec: SubjectSpec,
    kept: Option<Subject>,
}

impl Parents {
    /// None is booted yet.
    pub fn new(freeze: FreezeKind, spec: SubjectSpec) -> Parents {
        Parents {
            freeze,
            spec,
            kept: None,
        }
    }

    /// Whether each VM can be frozen like that only once.
    pub fn are_fresh(&self) -> bool {
        self.freeze == FreezeKind::Remap
    }

    /// Boots the one that is kept, if it is.
    pub fn prepare(&mut self) -> Result<(), BenchError> {
        if self.are_fresh() {
            return Ok(());
        }
        let subject = Subject::boot(&self.spec)?;
        if self.freeze == FreezeKind::Delta {
            // From then on it maps its memory privately.
            drop(subject.point(FreezeKind::Remap, MemoryMode::Cow)?);
        }
        self.kept = Some(subject);
        Ok(())
    }

    /// Has `act` fork one into one clone or none. It has just written its dirty pages, and what it was traced at
    /// before is forgotten.
    pub fn with_next<T>(
        &mut self,
        act: impl FnOnce(&Subject) -> Result<T, BenchError>,
    ) -> Result<T, BenchError> {
        let mut fresh = None;
        let subject = match &mut self.kept {
            Some(kept) => kept,
            None => fresh.insert(Subject::boot(&self.spec)?),
        };
        subject.get_ready(1)?;
        subject.rewrite()?;
        subject.trace();
        act(subject)
    }
}
