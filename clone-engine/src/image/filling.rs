//! Bringing pages into an image: one that a clone misses, the next one that is missing, or all.
//!
//! [`MemoryImage::provide`] is what a fault comes to; it never waits. The others wait, and are for
//! whoever is not in a fault: forks, the copier, a VM that is torn down.
#![allow(unsafe_code)] // The source of a page is given by address.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use forkvm_vmm::memory::PAGE;

use super::content::LineSink;
use super::{Content, Filling, MemoryImage, Owner, insert_error, pages};
use crate::fault::Notice;
use crate::fault::counters::Cause;
use crate::fault::fetcher::{Arrival, Fetcher, Nobody, Waiter};
use crate::source::local_image::LocalImage;
use crate::source::{PageSource, SourceError};
use crate::working_set::WorkingSet;

/// What became of a missing page.
#[derive(Debug)]
pub(crate) enum Provided {
    /// It is in the image, as are others of this range.
    Here(Range<u64>),
    /// It is zero, as is this range, and is nowhere stored.
    Zero(Range<u64>),
    /// Its source is far and was asked for this range; whoever waits will be told.
    Coming(Range<u64>),
}

/// Which missing pages are to be brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Which {
    /// Those that the source has.
    Own,
    /// All that clones may look for.
    All,
}

impl MemoryImage {
    /// Brings the page at `offset`, which a clone misses, and some around it. Never waits for a
    /// source that is far: then `waiter` is told.
    pub(crate) fn provide(
        self: &Arc<Self>,
        offset: u64,
        waiter: &Arc<dyn Waiter>,
    ) -> Result<Provided, SourceError> {
        let Some(filling) = &self.filling else {
            // What a whole file misses is a hole, and no page of a hole is made for one clone's sake.
            let run = match self.table.get().map(|table| table.at(offset)) {
                Some((Owner::Zero, run)) => offset..run.end,
                _ => offset..offset + PAGE,
            };
            return Ok(Provided::Zero(run));
        };
        filling.check_sound()?;
        if filling.present.has(offset) {
            return Ok(Provided::Here(offset..offset + PAGE));
        }
        let (owner, run) = self.known_table().at(offset);
        if matches!(owner, Owner::Zero) {
            return Ok(Provided::Zero(offset..run.end));
        }
        let mut range = filling.chunk_of(offset, &run);
        let mut here = self.bring_run(filling, &owner, &range, Cause::Fault, waiter);
        let may_pass = |why: &SourceError| !self.is_final(why);
        if here.as_ref().is_err_and(may_pass) && pages(&range) > 1 {
            // Perhaps for want of a page that nobody has touched.
            range = offset..offset + PAGE;
            here = self.bring_run(filling, &owner, &range, Cause::Fault, waiter);
        }
        Ok(if here? {
            Provided::Here(range)
        } else {
            Provided::Coming(range)
        })
    }

    /// Brings `range` before a clone misses it. Never waits: what is far is asked for. Zero pages are
    /// left to faults; `brought` hears of all others.
    pub(crate) fn provide_ahead(
        self: &Arc<Self>,
        range: &Range<u64>,
        mut brought: impl FnMut(&Range<u64>),
    ) -> Result<(), SourceError> {
        let Some(filling) = &self.filling else {
            return Ok(());
        };
        filling.check_sound()?;
        let nobody: Arc<dyn Waiter> = Arc::new(Nobody);
        for (owner, run) in self.known_table().within(range.clone()) {
            if !matches!(owner, Owner::Zero) {
                self.bring_run(filling, &owner, &run, Cause::Prefetch, &nobody)?;
                brought(&run);
            }
        }
        Ok(())
    }

    /// Brings the pages of `range` that are missing, for a VM that is not of this process. Never waits:
    /// `waiter` is asked for somebody to be told of each run, at once or later. A run that has arrived
    /// may still be [lacking](Self::lacks): then it can be asked for again.
    pub(crate) fn provide_all(
        self: &Arc<Self>,
        range: &Range<u64>,
        mut waiter: impl FnMut() -> Arc<dyn Waiter>,
    ) {
        let Some(filling) = &self.filling else { return };
        let since = Instant::now();
        for (owner, run) in self.coming(range.clone()) {
            let waiter = waiter();
            let sound = filling.check_sound();
            let bring = |()| self.bring_run(filling, &owner, &run, Cause::Fault, &waiter);
            match sound.and_then(bring) {
                Ok(true) => {
                    filling.counters.took(since.elapsed());
                    waiter.arrived(&run);
                }
                Ok(false) => {}
                Err(why) => waiter.lost(&why),
            }
        }
    }

    /// Whether a page of `range` that is not zero is missing.
    pub(crate) fn lacks(&self, range: &Range<u64>) -> bool {
        let Some(filling) = &self.filling else {
            return false;
        };
        let mut runs = self.coming(range.clone());
        runs.any(|(_, run)| filling.present.missing(run).next().is_some())
    }

    /// Brings pages of one run, from wherever they come. `false` when they are far and `waiter` will be
    /// told.
    fn bring_run(
        self: &Arc<Self>,
        filling: &Filling,
        owner: &Owner<'_>,
        range: &Range<u64>,
        cause: Cause,
        waiter: &Arc<dyn Waiter>,
    ) -> Result<bool, SourceError> {
        match owner {
            Owner::Zero => Ok(true),
            Owner::Base(base) if !filling.elsewhere => {
                self.bring_from(filling, base, range, cause, waiter)
            }
            Owner::Own | Owner::Base(_) => self.bring_own(filling, range, cause, waiter),
        }
    }

    /// Brings what is missing of `set`, wherever the clones of this image look for it, without waiting
    /// for what is far: its source is told of all of it at once, and asked for it behind the faults.
    pub(crate) fn replay(self: &Arc<Self>, set: &WorkingSet) -> Result<(), SourceError> {
        for (part, image) in self.mapped() {
            let within = set.ranges().iter().filter_map(|range| {
                let both = range.start.max(part.start)..range.end.min(part.end);
                (!both.is_empty()).then_some(both)
            });
            let within: Vec<Range<u64>> = within.collect();
            image.hint(&within);
            for range in &within {
                image.provide_ahead(range, |_brought| ())?;
            }
        }
        Ok(())
    }

    /// Tells the source which of its pages in `ranges` will be asked for.
    fn hint(&self, ranges: &[Range<u64>]) {
        let Some(filling) = &self.filling else { return };
        let source = filling
            .source
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(source) = &*source {
            let missing = ranges.iter().flat_map(|range| {
                let runs = self.known_table().within(range.clone());
                let own = runs.filter(|(owner, _)| matches!(owner, Owner::Own));
                own.flat_map(|(_, run)| filling.present.missing(run))
            });
            source.hint(&missing.collect::<Vec<_>>());
        }
    }

    /// Brings own pages of one run from the source. `false` when it is far and `waiter` will be told.
    fn bring_own(
        self: &Arc<Self>,
        filling: &Filling,
        range: &Range<u64>,
        cause: Cause,
        waiter: &Arc<dyn Waiter>,
    ) -> Result<bool, SourceError> {
        if filling.present.missing(range.clone()).next().is_none() {
            // A far source has brought them since they were asked for.
            return Ok(true);
        }
        let source = filling
            .source
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        let Some(source) = &*source else {
            return filling.lost.get().map_or(Ok(true), |why| Err(why.clone()));
        };
        let mut inserted = Ok(());
        let local = source.local(range, &mut |content| {
            inserted = self.insert_own(filling, range, Content::from(content), cause);
        });
        inserted?;
        if !local {
            let fetcher = filling.fetcher.get_or_init(Fetcher::default);
            fetcher.want(self, source, range.clone(), cause, waiter)?;
        }
        Ok(local)
    }

    /// Brings pages of one run that `base` holds, by way of `base`.
    fn bring_from(
        self: &Arc<Self>,
        filling: &Filling,
        base: &Arc<MemoryImage>,
        range: &Range<u64>,
        cause: Cause,
        waiter: &Arc<dyn Waiter>,
    ) -> Result<bool, SourceError> {
        if !base.bring(range, cause, waiter)? {
            return Ok(false);
        }
        let mut sink = LineSink {
            image: self,
            filling,
            cause,
        };
        LocalImage(base).fetch(std::slice::from_ref(range), &mut sink)?;
        Ok(true)
    }

    /// Brings own pages of this image for one of a later image. `false` when they are far.
    fn bring(
        self: &Arc<Self>,
        range: &Range<u64>,
        cause: Cause,
        waiter: &Arc<dyn Waiter>,
    ) -> Result<bool, SourceError> {
        let Some(filling) = &self.filling else {
            return Ok(true);
        };
        filling.check_sound()?;
        if filling.present.missing(range.clone()).next().is_none() {
            return Ok(true);
        }
        self.bring_own(filling, range, cause, waiter)
    }

    /// Puts those pages of `range` that are its own into the image, if they are not there yet.
    pub(crate) fn take(
        &self,
        range: &Range<u64>,
        content: Content<'_>,
        cause: Cause,
    ) -> Result<(), SourceError> {
        let Some(filling) = &self.filling else {
            return Ok(());
        };
        for (owner, run) in self.known_table().within(range.clone()) {
            if matches!(owner, Owner::Own) {
                let part = content.part(run.start - range.start, run.end - run.start);
                self.insert_own(filling, &run, part, cause)?;
            }
        }
        Ok(())
    }

    fn insert_own(
        &self,
        filling: &Filling,
        range: &Range<u64>,
        content: Content<'_>,
        cause: Cause,
    ) -> Result<(), SourceError> {
        if let Some(why) = filling.lost.get() {
            return Err(why.clone());
        }
        self.insert(filling, range, content, |new| {
            filling.counters.count(cause, new);
            filling.own_left.fetch_sub(new, Ordering::AcqRel) == new
        })
    }

    /// Puts those pages of `range` into the image that are not there. `count` hears how many were
    /// new, and says whether they were the last of their kind.
    pub(super) fn insert(
        &self,
        filling: &Filling,
        range: &Range<u64>,
        content: Content<'_>,
        count: impl Fn(u64) -> bool,
    ) -> Result<(), SourceError> {
        let mut last = false;
        for part in filling.present.missing(range.clone()) {
            let from = content.part(part.start - range.start, part.end - part.start);
            let mut new_pages = 0;
            let new = |new: Range<u64>| {
                filling.present.set(&new);
                new_pages += pages(&new);
            };
            // SAFETY: the content is as long as the part, and is there as long as it is borrowed.
            let inserted = unsafe { self.store.insert(&part, from.address, new) };
            if new_pages > 0 {
                last |= count(new_pages);
            }
            inserted.map_err(|error| insert_error(part.start, &error))?;
            // Also what somebody else has just put in and may not have come to mark.
            filling.present.set(&part);
        }
        if last && filling.notices.send(Notice::LastPage).is_err() {
            tracing::trace!("an image filled up after its family's end");
        }
        Ok(())
    }

    /// The next missing pages at or after `from`: at most a chunk, of one owner.
    fn next_missing(&self, from: u64, which: Which) -> Option<Range<u64>> {
        let filling = self.filling.as_ref()?;
        for (owner, run) in self.known_table().within(from..self.len) {
            let mut missing = filling.present.missing(run.clone());
            let found = match owner {
                Owner::Zero => None,
                Owner::Own => missing.next(),
                Owner::Base(_) if which == Which::Own => None,
                Owner::Base(_) => missing.find_map(|run| self.plan.get()?.own_within(run).next()),
            };
            if let Some(found) = found {
                let chunk = filling.chunk_of(found.start, &run);
                return Some(found.start..chunk.end.min(found.end));
            }
        }
        None
    }

    /// Brings the next missing pages at or after `from`, waiting for them. `None` when there are no
    /// more; else which they were, and whether they came.
    pub(crate) fn fill_next(
        self: &Arc<Self>,
        from: u64,
        which: Which,
        cause: Cause,
    ) -> Option<(Range<u64>, Result<(), SourceError>)> {
        let range = self.next_missing(from, which)?;
        let filled = self.fill(&range, cause);
        Some((range, filled))
    }

    /// Brings pages of one owner, waiting for them.
    fn fill(self: &Arc<Self>, range: &Range<u64>, cause: Cause) -> Result<(), SourceError> {
        let Some(filling) = &self.filling else {
            return Ok(());
        };
        loop {
            let arrival = Arc::new(Arrival::default());
            let waiter: Arc<dyn Waiter> = arrival.clone();
            let owner = self.known_table().at(range.start).0;
            if self.bring_run(filling, &owner, range, cause, &waiter)? {
                return Ok(());
            }
            arrival.wait()?;
        }
    }

    /// Brings everything that is missing, waiting for it.
    fn fill_all(self: &Arc<Self>) -> Result<(), SourceError> {
        let mut from = 0;
        while let Some((range, filled)) = self.fill_next(from, Which::All, Cause::Background) {
            filled?;
            from = range.end;
        }
        Ok(())
    }

    /// Brings all of its own pages that can be had, waiting for them. After an error the others are
    /// there, unless nothing can be expected of the source any more; it says why the first is not.
    pub(crate) fn fill_own(self: &Arc<Self>) -> Result<(), SourceError> {
        let mut all = Ok(());
        let mut from = 0;
        while let Some((range, filled)) = self.fill_next(from, Which::Own, Cause::Background) {
            from = range.end;
            let filled = match filled {
                Err(why) if !self.is_final(&why) && pages(&range) > 1 => {
                    self.fill_one_by_one(range)
                }
                filled => filled,
            };
            match filled {
                Err(why) if self.is_final(&why) => return Err(why),
                filled => all = all.and(filled),
            }
        }
        all
    }

    /// Brings those own pages of `range` that can be had, which cannot be had together.
    fn fill_one_by_one(self: &Arc<Self>, range: Range<u64>) -> Result<(), SourceError> {
        let mut all = Ok(());
        for page in range.step_by(PAGE as usize) {
            match self.fill(&(page..page + PAGE), Cause::Background) {
                Err(why) if self.is_final(&why) => return Err(why),
                filled => all = all.and(filled),
            }
        }
        all
    }

    /// Whether no other page will come either.
    fn is_final(&self, why: &SourceError) -> bool {
        why.is_final() || self.is_lost()
    }

    /// Brings everything that a clone could miss, here and in the images that are mapped with it.
    pub(crate) fn complete(self: &Arc<Self>) -> Result<(), SourceError> {
        complete(&self.mapped())
    }

    /// Brings the page at `offset` and those around it, waiting for them, to wherever the clones of
    /// this image look for it. Returns the image and whether it holds the page at all.
    fn fill_at(self: &Arc<Self>, offset: u64) -> Result<Option<Arc<MemoryImage>>, SourceError> {
        let mapped = match self.plan.get() {
            Some(plan) => plan.at(offset, self),
            None => self.clone(),
        };
        if let Some(filling) = &mapped.filling {
            let (owner, run) = mapped.known_table().at(offset);
            if matches!(owner, Owner::Zero) {
                return Ok(None);
            }
            mapped.fill(&filling.chunk_of(offset, &run), Cause::Prefetch)?;
        }
        Ok(Some(mapped))
    }

    /// Brings the page at `offset` ahead of its first access.
    pub(crate) fn prefetch(self: &Arc<Self>, offset: u64) -> Result<(), SourceError> {
        self.fill_at(offset).map(|_image| ())
    }

    /// Reads the 64-bit word at `offset`, as a clone would see it at its start.
    pub(crate) fn read_word(self: &Arc<Self>, offset: u64) -> Result<u64, SourceError> {
        let mut word = [0; 8];
        if let Some(image) = self.fill_at(offset & !(PAGE - 1))? {
            let read = image.read(offset, &mut word);
            read.map_err(|error| insert_error(offset, &error))?;
        }
        Ok(u64::from_le_bytes(word))
    }
}

impl Filling {
    /// An error once what the image holds cannot be relied on.
    fn check_sound(&self) -> Result<(), SourceError> {
        self.spoiled.get().map_or(Ok(()), |why| Err(why.clone()))
    }

    /// The chunk around `offset`, cut to `run`.
    fn chunk_of(&self, offset: u64, run: &Range<u64>) -> Range<u64> {
        let start = offset - offset % self.config.chunk;
        start.max(run.start)..(start + self.config.chunk).min(run.end)
    }
}

/// Brings everything that is missing in images that are mapped together.
pub(crate) fn complete(mapped: &[(Range<u64>, Arc<MemoryImage>)]) -> Result<(), SourceError> {
    distinct(mapped).try_for_each(|image| {
        image.fill_all()?;
        image.settle();
        Ok(())
    })
}

/// Each image of a mapping once.
pub(crate) fn distinct(
    mapped: &[(Range<u64>, Arc<MemoryImage>)],
) -> impl Iterator<Item = &Arc<MemoryImage>> {
    let mut seen = HashSet::new();
    mapped
        .iter()
        .map(|(_, image)| image)
        .filter(move |image| seen.insert(Arc::as_ptr(image)))
}
