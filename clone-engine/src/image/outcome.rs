//! What becomes of an image that fills: whole, given up by its source, or spoiled.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, Weak};

use super::MemoryImage;
use crate::fault::fetcher::Fetcher;
use crate::source::SourceError;

/// Maps an image that fills, in this process or in another, and is told what becomes of it. What is told
/// must not wait for a page.
pub(crate) trait Mapper: Send + Sync {
    /// Nothing is missing any more.
    fn whole(&self);

    /// It cannot be relied on any more: whoever maps it is to end.
    fn lost(&self, why: &SourceError);
}

impl MemoryImage {
    /// What follows from the pages that have come: without own pages missing the source goes, whole
    /// it is closed for good and its VMs are told. Called by whoever is not in a fault; any number of
    /// times.
    pub(crate) fn settle(&self) {
        let Some(filling) = &self.filling else {
            return;
        };
        if !self.is_fed() {
            return;
        }
        let source = filling
            .source
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(fetcher) = filling.fetcher.get() {
            fetcher.finish();
        }
        // A live parent lifts its protections here.
        drop(source);
        if !self.is_whole() || filling.closed.swap(true, Ordering::AcqRel) {
            return;
        }
        if !filling.elsewhere
            && let Err(error) = self.store.close()
        {
            tracing::error!(%error, "a whole image could not be sealed");
        }
        for mapper in self.mapped_by() {
            mapper.whole();
        }
    }

    /// The source will not deliver any more: whoever needs a page that is missing hears why.
    pub(crate) fn give_up(&self, why: SourceError) {
        let Some(filling) = &self.filling else {
            return;
        };
        if filling.lost.set(why.clone()).is_err() {
            return;
        }
        tracing::error!(%why, "an image cannot be filled any more");
        let source = filling
            .source
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        drop(source);
        if let Some(fetcher) = filling.fetcher.get() {
            fetcher.give_up(self, &why);
        }
    }

    /// A page of this instant could not be kept and is about to be written: what comes in from now on
    /// may be of a later instant. Takes no lock; [`spoil`](Self::spoil) does what follows from it.
    pub(crate) fn mark_spoiled(&self, why: &SourceError) {
        if let Some(filling) = &self.filling {
            filling.spoiled.get_or_init(|| why.clone());
        }
    }

    /// Ends all who map an image that is marked as spoiled.
    pub(crate) fn spoil(&self, why: &SourceError) {
        self.mark_spoiled(why);
        self.give_up(why.clone());
        for mapper in self.mapped_by() {
            mapper.lost(why);
        }
    }

    /// Whether pages that are missing will never come.
    pub(crate) fn is_lost(&self) -> bool {
        self.filling
            .as_ref()
            .is_some_and(|filling| filling.lost.get().is_some())
    }

    /// Those who map it and would have been told when it is whole.
    fn mapped_by(&self) -> Vec<Arc<dyn Mapper>> {
        let mut mapped_by = self
            .mapped_by
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let taken = std::mem::take(&mut *mapped_by);
        taken.iter().filter_map(Weak::upgrade).collect()
    }

    /// Gives up a source that is silent for longer than it may be.
    pub(crate) fn check_deadline(&self) {
        let Some(filling) = &self.filling else {
            return;
        };
        let deadline = filling.config.page_deadline;
        if let Some(silent) = filling.fetcher.get().and_then(Fetcher::busy_for)
            && silent > deadline
        {
            let source = filling
                .source
                .read()
                .unwrap_or_else(PoisonError::into_inner);
            let name = source
                .as_ref()
                .map_or_else(String::new, |source| source.name());
            drop(source);
            let why = format!("no answer within {deadline:?}");
            self.give_up(SourceError::Gone { name, why });
        }
    }
}
