//! Memory images: the guest memory of one instant, shared by all clones of it.
//!
//! An image is *whole* when every page that was populated at the freeze is in its memfd; then it is
//! never written again, and clones map it copy-on-write without anybody's help. An image that still
//! *fills* has a [`PageSource`] for its own pages, and an owner table that says which pages those
//! are, which one of the earlier images of its line holds, and which are zero. Clones map it all the
//! same: a page that is missing raises a fault, and [`MemoryImage::provide`] brings it.
//!
//! **Why a page is never torn.** A page enters by [`store::Store::insert`] only, which is atomic and
//! where the first one wins. A page of a live parent may be written while it is copied; but the
//! parent's write waits until the page is in every image that needs it, so whoever copied the torn
//! page comes second and its copy is dropped. Hence copiers need no lock among each other.
//!
//! Freed with its last user: fork points, clones that map it, later images of its line.
#![allow(unsafe_code)] // The source of a page is given by address.

#[cfg(test)]
mod model_tests;
mod owner_table;
mod page_bitmap;
mod plan;
mod store;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::fmt;
use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock, Weak};

use forkvm_vmm::MemoryError;
use forkvm_vmm::memory::{self, PAGE};
use vm_memory::VolatileSlice;

use crate::fault::counters::{Cause, FaultCounters};
use crate::fault::fetcher::{Arrival, Fetcher, Waiter};
use crate::fault::{FaultConfig, Notice};
use crate::source::local_image::LocalImage;
use crate::source::{PageSink, PageSource, SourceError};
use crate::vm_memory::VmMemory;

use page_bitmap::PageBitmap;
use store::Store;

pub(crate) use owner_table::{Owner, OwnerTable};
pub(crate) use plan::Plan;
pub use store::StoreError;

/// See the module's text. Offsets are file offsets of RAM in bytes.
pub struct MemoryImage {
    len: u64,
    store: Store,
    /// Known from the freeze on, or for a file that was taken over whole from its publication on.
    table: OnceLock<OwnerTable>,
    /// Which image is mapped where by the clones of this one; from the publication on.
    plan: OnceLock<Plan>,
    /// `None` for an image that was whole from the start.
    filling: Option<Filling>,
    /// VMs that map it, to be told when it is whole.
    mapped_by: Mutex<Vec<Weak<VmMemory>>>,
}

/// What an image needs while pages are missing.
struct Filling {
    present: PageBitmap,
    /// Own pages that are missing: as long as there are any, the source must live.
    own_left: AtomicU64,
    /// Pages of earlier images that clones look for here and that are missing.
    base_left: AtomicU64,
    /// Of the own pages; `None` once they are all here.
    source: RwLock<Option<Arc<dyn PageSource>>>,
    fetcher: OnceLock<Fetcher>,
    /// Why pages that are missing will never come.
    lost: OnceLock<SourceError>,
    /// Nothing is missing, and that was acted on.
    closed: AtomicBool,
    /// Why those that are there cannot be relied on either.
    spoiled: OnceLock<SourceError>,
    config: FaultConfig,
    counters: Arc<FaultCounters>,
    notices: Sender<Notice>,
}

impl fmt::Debug for MemoryImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryImage")
            .field("len", &self.len)
            .field("whole", &self.is_whole())
            .finish_non_exhaustive()
    }
}

/// What became of a missing page.
#[derive(Debug)]
pub(crate) enum Provided {
    /// It is in the image, as are others of this range.
    Here(Range<u64>),
    /// It is zero, as is this range, and is nowhere stored.
    Zero(Range<u64>),
    /// Its source is far; whoever waits will be told.
    Coming,
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
    /// A file that holds the whole memory already: the one that a VM has mapped until now, or one
    /// that was filled before anybody mapped it.
    pub fn whole(file: Arc<File>, len: u64) -> Arc<MemoryImage> {
        Arc::new(MemoryImage {
            len,
            store: Store::whole(file),
            table: OnceLock::new(),
            plan: OnceLock::new(),
            filling: None,
            mapped_by: Mutex::default(),
        })
    }

    /// An image without a page yet: `table` says what belongs into it, `source` has what is its own.
    pub(crate) fn filling(
        store: EmptyImage,
        table: OwnerTable,
        source: Arc<dyn PageSource>,
    ) -> Arc<MemoryImage> {
        let own = table
            .within(0..store.len)
            .filter(|(owner, _)| matches!(owner, Owner::Own));
        let own_left = own.map(|(_, run)| pages(&run)).sum();
        let EmptyImage {
            len,
            store,
            config,
            counters,
            notices,
        } = store;
        Arc::new(MemoryImage {
            len,
            store,
            table: OnceLock::from(table),
            plan: OnceLock::new(),
            filling: Some(Filling {
                present: PageBitmap::new(len),
                own_left: AtomicU64::new(own_left),
                base_left: AtomicU64::new(0),
                source: RwLock::new(Some(source)),
                fetcher: OnceLock::new(),
                lost: OnceLock::new(),
                closed: AtomicBool::new(false),
                spoiled: OnceLock::new(),
                config,
                counters,
                notices,
            }),
            mapped_by: Mutex::default(),
        })
    }

    /// Says which image the clones of this one map where, and so which pages have to come here.
    pub(crate) fn publish(&self, plan: Plan) -> Result<(), MemoryError> {
        let table = self.table()?;
        if let Some(filling) = &self.filling {
            let looked_for = plan.own_parts().flat_map(|part| table.within(part.clone()));
            let of_others = looked_for.filter(|(owner, _)| matches!(owner, Owner::Base(_)));
            let base_left = of_others.map(|(_, run)| pages(&run)).sum();
            filling.base_left.store(base_left, Ordering::Release);
        }
        let first = self.plan.set(plan).is_ok();
        debug_assert!(first, "an image is published once");
        Ok(())
    }

    /// Who holds what. Of a file that was taken over, what it holds by now: pages that clones have
    /// touched since are zero and count as held.
    pub(crate) fn table(&self) -> Result<&OwnerTable, MemoryError> {
        if let Some(table) = self.table.get() {
            return Ok(table);
        }
        let data = memory::data_extents(self.store.file())?;
        Ok(self.table.get_or_init(|| OwnerTable::own(self.len, &data)))
    }

    fn known_table(&self) -> &OwnerTable {
        self.table
            .get()
            .expect("a filling image has its table from the start")
    }

    /// Which image a clone of this one maps where.
    pub(crate) fn mapped(self: &Arc<Self>) -> Vec<(Range<u64>, Arc<MemoryImage>)> {
        match self.plan.get() {
            Some(plan) => plan.mapped(self),
            None => vec![(0..self.len, self.clone())],
        }
    }

    /// Bytes that are not zero.
    pub fn populated(&self) -> Result<u64, MemoryError> {
        let populated = self.table()?.populated();
        Ok(populated.iter().map(|run| run.end - run.start).sum())
    }

    /// Whether nothing is missing in this image.
    pub fn is_whole(&self) -> bool {
        self.filling.as_ref().is_none_or(|filling| {
            self.plan.get().is_some()
                && filling.own_left.load(Ordering::Acquire) == 0
                && filling.base_left.load(Ordering::Acquire) == 0
        })
    }

    /// Whether its own pages are all here: it needs its source no more.
    pub(crate) fn is_fed(&self) -> bool {
        self.own_left() == 0
    }

    /// Whether it still takes own pages from somebody.
    pub(crate) fn is_fed_by_somebody(&self) -> bool {
        !self.is_fed() && !self.is_lost()
    }

    /// Own pages that are missing.
    pub(crate) fn own_left(&self) -> u64 {
        let left = |filling: &Filling| filling.own_left.load(Ordering::Acquire);
        self.filling.as_ref().map_or(0, left)
    }

    /// Pages that have come so far; what an image was whole with does not count.
    pub fn pages_present(&self) -> u64 {
        let present = |filling: &Filling| {
            let missing = filling.present.missing(0..self.len);
            (self.len - missing.map(|run| run.end - run.start).sum::<u64>()) / PAGE
        };
        self.filling.as_ref().map_or(0, present)
    }

    /// `vm` maps it, and is to be told when it is whole.
    pub(crate) fn map_by(&self, vm: &Arc<VmMemory>) {
        let mut mapped_by = self
            .mapped_by
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        mapped_by.retain(|vm| vm.strong_count() > 0);
        mapped_by.push(Arc::downgrade(vm));
    }

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
        let chunk = filling.chunk_of(offset, &run);
        let here = match owner {
            Owner::Zero => return Ok(Provided::Zero(offset..run.end)),
            Owner::Own => self.bring_own(filling, &chunk, Cause::Fault, waiter)?,
            Owner::Base(base) => self.bring_from(filling, base, &chunk, Cause::Fault, waiter)?,
        };
        Ok(if here {
            Provided::Here(chunk)
        } else {
            Provided::Coming
        })
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

    /// Reads pages that are there.
    pub(crate) fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.store.read(offset, into)
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
    fn insert(
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
                Owner::Base(_) => missing.find_map(|run| self.plan.get()?.own_within(run)),
            };
            if let Some(found) = found {
                let chunk = filling.chunk_of(found.start, &run);
                return Some(found.start..chunk.end.min(found.end));
            }
        }
        None
    }

    /// Brings the next missing pages at or after `from`, waiting for them. `None` when there are no
    /// more; else where they end and how many bytes they were.
    pub(crate) fn fill_next(
        self: &Arc<Self>,
        from: u64,
        which: Which,
        cause: Cause,
    ) -> Result<Option<Range<u64>>, SourceError> {
        let Some(range) = self.next_missing(from, which) else {
            return Ok(None);
        };
        self.fill(&range, cause)?;
        Ok(Some(range))
    }

    /// Brings pages of one owner, waiting for them.
    fn fill(self: &Arc<Self>, range: &Range<u64>, cause: Cause) -> Result<(), SourceError> {
        let Some(filling) = &self.filling else {
            return Ok(());
        };
        loop {
            let arrival = Arc::new(Arrival::default());
            let waiter: Arc<dyn Waiter> = arrival.clone();
            let here = match self.known_table().at(range.start).0 {
                Owner::Zero => true,
                Owner::Own => self.bring_own(filling, range, cause, &waiter)?,
                Owner::Base(base) => self.bring_from(filling, base, range, cause, &waiter)?,
            };
            if here {
                return Ok(());
            }
            arrival.wait()?;
        }
    }

    /// Brings everything that is missing, waiting for it.
    pub(crate) fn fill_all(self: &Arc<Self>, which: Which) -> Result<(), SourceError> {
        let mut from = 0;
        while let Some(filled) = self.fill_next(from, which, Cause::Background)? {
            from = filled.end;
        }
        Ok(())
    }

    /// Brings everything that a clone could miss, here and in the images that are mapped with it.
    pub(crate) fn complete(self: &Arc<Self>) -> Result<(), SourceError> {
        complete(&self.mapped())
    }

    /// Its own pages, as ranges that rise and are apart.
    pub(crate) fn own_pages(&self) -> Result<Vec<Range<u64>>, MemoryError> {
        let runs = self.table()?.within(0..self.len);
        let own = runs.filter(|(owner, _)| matches!(owner, Owner::Own));
        Ok(own.map(|(_, run)| run).collect())
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
        if let Err(error) = self.store.close() {
            tracing::error!(%error, "a whole image could not be sealed");
        }
        for vm in self.mapped_by() {
            vm.relax();
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

    /// Ends every VM that maps an image that is marked as spoiled.
    pub(crate) fn spoil(&self, why: &SourceError) {
        self.mark_spoiled(why);
        self.give_up(why.clone());
        for vm in self.mapped_by() {
            vm.lost(why);
        }
    }

    /// Whether pages that are missing will never come.
    pub(crate) fn is_lost(&self) -> bool {
        self.filling
            .as_ref()
            .is_some_and(|filling| filling.lost.get().is_some())
    }

    /// The VMs that map it and would have been told when it is whole.
    fn mapped_by(&self) -> Vec<Arc<VmMemory>> {
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

    /// Whether all of `range`, own pages, has come.
    pub(crate) fn has(&self, range: &Range<u64>) -> bool {
        let missing = |filling: &Filling| filling.present.missing(range.clone()).next();
        self.filling.as_ref().and_then(missing).is_none()
    }

    /// Proves that nothing can write to it any more (F_SEAL_WRITE), of an image that was whole from the
    /// start; one that fills is sealed when nothing is missing. Fails with EBUSY while somebody still
    /// maps it shared and writable: a parent that was stopped and not yet torn down, or a stray
    /// writer. Not for the parent's pause: it walks the whole image.
    pub fn seal(&self) -> Result<(), MemoryError> {
        match self.filling {
            None => self.store.close(),
            Some(_) => Ok(()),
        }
    }

    /// The memfd, to be mapped privately.
    pub fn file(&self) -> &Arc<File> {
        self.store.file()
    }

    /// Bytes that are brought together.
    pub(crate) fn chunk(&self) -> u64 {
        let chunk = |filling: &Filling| filling.config.chunk;
        self.filling.as_ref().map_or(PAGE, chunk)
    }

    /// Bytes of memory.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it is the image of no memory at all; never so for a VM's.
    pub fn is_empty(&self) -> bool {
        self.len == 0
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
        image.fill_all(Which::All)?;
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

/// Takes what a far source delivers for its image.
pub(crate) struct ImageSink<'a> {
    pub(crate) image: &'a MemoryImage,
    pub(crate) source: &'a str,
    pub(crate) cause: Cause,
}

impl PageSink for ImageSink<'_> {
    fn pages(&mut self, offset: u64, content: &[u8]) -> Result<(), SourceError> {
        let (image, len) = (self.image, content.len() as u64);
        let end = offset.checked_add(len).filter(|end| *end <= image.len);
        let (Some(end), true) = (end, offset.is_multiple_of(PAGE) && len.is_multiple_of(PAGE))
        else {
            return Err(SourceError::Rubbish {
                name: self.source.to_owned(),
                offset,
                len,
            });
        };
        // Pages that are not the source's to give are left out.
        image.take(&(offset..end), Content::from(content), self.cause)
    }

    fn zero(&mut self, range: Range<u64>) -> Result<(), SourceError> {
        let len = range.end.saturating_sub(range.start);
        if range.end > self.image.len {
            return Err(SourceError::Rubbish {
                name: self.source.to_owned(),
                offset: range.start,
                len,
            });
        }
        let zeros = [0; 16 * PAGE as usize];
        for start in range.clone().step_by(zeros.len()) {
            let len = (range.end - start).min(zeros.len() as u64);
            self.pages(start, &zeros[..len as usize])?;
        }
        Ok(())
    }
}

/// Takes what an earlier image of the line holds.
struct LineSink<'a> {
    image: &'a MemoryImage,
    filling: &'a Filling,
    cause: Cause,
}

impl PageSink for LineSink<'_> {
    fn pages(&mut self, offset: u64, content: &[u8]) -> Result<(), SourceError> {
        let (range, filling) = (offset..offset + content.len() as u64, self.filling);
        self.image
            .insert(filling, &range, Content::from(content), |new| {
                filling.counters.count(self.cause, new);
                filling.base_left.fetch_sub(new, Ordering::AcqRel) == new
            })
    }

    /// An image holds no zero page that somebody would look for.
    fn zero(&mut self, _range: Range<u64>) -> Result<(), SourceError> {
        Ok(())
    }
}

/// An image before it is known what belongs into it: made ahead of a pause.
pub(crate) struct EmptyImage {
    len: u64,
    store: Store,
    config: FaultConfig,
    counters: Arc<FaultCounters>,
    notices: Sender<Notice>,
}

impl EmptyImage {
    pub(crate) fn new(
        len: u64,
        config: FaultConfig,
        counters: Arc<FaultCounters>,
        notices: Sender<Notice>,
    ) -> Result<EmptyImage, StoreError> {
        Ok(EmptyImage {
            len,
            store: Store::empty(len)?,
            config,
            counters,
            notices,
        })
    }
}

/// Bytes that go into an image; whoever owns them may write them meanwhile.
#[derive(Clone, Copy)]
pub(crate) struct Content<'a> {
    address: *const u8,
    len: u64,
    borrowed: PhantomData<&'a [u8]>,
}

impl<'a> Content<'a> {
    fn part(self, from: u64, len: u64) -> Content<'a> {
        assert!(from.checked_add(len).is_some_and(|end| end <= self.len));
        Content {
            address: self.address.wrapping_add(from as usize),
            len,
            borrowed: PhantomData,
        }
    }
}

impl<'a> From<&'a [u8]> for Content<'a> {
    fn from(bytes: &'a [u8]) -> Content<'a> {
        Content {
            address: bytes.as_ptr(),
            len: bytes.len() as u64,
            borrowed: PhantomData,
        }
    }
}

impl<'a> From<VolatileSlice<'a>> for Content<'a> {
    fn from(slice: VolatileSlice<'a>) -> Content<'a> {
        Content {
            address: slice.ptr_guard().as_ptr(),
            len: slice.len() as u64,
            borrowed: PhantomData,
        }
    }
}

fn pages(range: &Range<u64>) -> u64 {
    (range.end - range.start) / PAGE
}

fn insert_error(offset: u64, why: &dyn std::fmt::Display) -> SourceError {
    SourceError::Insert {
        offset,
        why: why.to_string(),
    }
}
