//! Memory images: the guest memory of one instant, shared by all clones of it.
//!
//! An image is *whole* when every page that was populated at the freeze is in its memfd; then it is
//! never written again, and clones map it copy-on-write without anybody's help. An image that still
//! *fills* has a [`PageSource`] for its own pages, and an owner table that says which pages those
//! are, which one of the earlier images of its line holds, and which are zero. Clones map it all the
//! same: a page that is missing raises a fault, and `MemoryImage::provide` brings it.
//!
//! **Why a page is never torn.** A page enters by `store::Store::insert` only, which is atomic and
//! where the first one wins. A page of a live parent may be written while it is copied; but the
//! parent's write waits until the page is in every image that needs it, so whoever copied the torn
//! page comes second and its copy is dropped. Hence copiers need no lock among each other.
//!
//! Freed with its last user: fork points, clones that map it, later images of its line.

mod content;
mod elsewhere;
mod filling;
#[cfg(feature = "micro-benchmarks")]
pub mod micro;
#[cfg(test)]
mod model_tests;
mod name;
mod outcome;
mod outline;
mod owner_table;
mod page_bitmap;
mod plan;
mod store;
#[cfg(test)]
mod tests;

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock, Weak};

use forkvm_vmm::MemoryError;
use forkvm_vmm::memory::{self, PAGE};

use crate::fault::counters::FaultCounters;
use crate::fault::fetcher::Fetcher;
use crate::fault::{FaultConfig, Notice};
use crate::source::{PageSource, SourceError};

use page_bitmap::PageBitmap;
use store::Store;

pub(crate) use content::{Content, ImageSink};
pub(crate) use filling::{Provided, Which, complete, distinct};
pub(crate) use name::ImageName;
pub(crate) use outcome::Mapper;
pub(crate) use outline::{Arrivals, Arriving, Outline, OutlineError};
pub(crate) use owner_table::{Owner, OwnerTable};
pub(crate) use plan::Plan;
pub use store::StoreError;

/// See the module's text. Offsets are file offsets of RAM in bytes.
pub struct MemoryImage {
    name: ImageName,
    len: u64,
    store: Store,
    /// Known from the freeze on, or for a file that was taken over whole from its publication on.
    table: OnceLock<OwnerTable>,
    /// Which image is mapped where by the clones of this one; from the publication on.
    plan: OnceLock<Plan>,
    /// `None` for an image that was whole from the start.
    filling: Option<Filling>,
    /// Who maps it, to be told when it is whole.
    mapped_by: Mutex<Vec<Weak<dyn Mapper>>>,
}

/// What an image needs while pages are missing.
struct Filling {
    present: PageBitmap,
    /// Whether another process puts the pages in, whoever holds them; the source only says when.
    elsewhere: bool,
    /// Own pages that are missing, elsewhere all: as long as there are any, the source must live.
    own_left: AtomicU64,
    /// Pages of earlier images that clones look for here and that are missing.
    base_left: AtomicU64,
    /// Of the own pages, elsewhere of all; `None` once they are here.
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

impl MemoryImage {
    /// A file that holds the whole memory already: the one that a VM has mapped until now, or one
    /// that was filled before anybody mapped it.
    pub fn whole(file: Arc<File>, len: u64) -> Arc<MemoryImage> {
        MemoryImage::whole_of(ImageName::new(), file, len)
    }

    /// The same, of an image that has a name.
    fn whole_of(name: ImageName, file: Arc<File>, len: u64) -> Arc<MemoryImage> {
        Arc::new(MemoryImage {
            name,
            len,
            store: Store::whole(file),
            table: OnceLock::new(),
            plan: OnceLock::new(),
            filling: None,
            mapped_by: Mutex::default(),
        })
    }

    /// A whole image of a line, with what its `file` does not say by itself.
    fn of_line(
        name: ImageName,
        file: Arc<File>,
        table: OwnerTable,
        plan: Plan,
    ) -> Arc<MemoryImage> {
        Arc::new(MemoryImage {
            name,
            len: table.len(),
            store: Store::whole(file),
            table: OnceLock::from(table),
            plan: OnceLock::from(plan),
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
        let runs = table.within(0..store.len);
        let own = runs.filter(|(owner, _)| matches!(owner, Owner::Own));
        let own_left = own.map(|(_, run)| pages(&run)).sum();
        let EmptyImage {
            name,
            len,
            store,
            elsewhere,
            config,
            counters,
            notices,
        } = store;
        Arc::new(MemoryImage {
            name,
            len,
            store,
            table: OnceLock::from(table),
            plan: OnceLock::new(),
            filling: Some(Filling {
                present: PageBitmap::new(len),
                elsewhere,
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
            // Elsewhere all of it comes from the source.
            let left = match filling.elsewhere {
                true => &filling.own_left,
                false => &filling.base_left,
            };
            left.fetch_add(base_left, Ordering::AcqRel);
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

    /// Pages of `range` that its file holds or will hold, with who holds them from the start: its own, and
    /// those of earlier images that its clones look for here.
    fn coming(&self, range: Range<u64>) -> impl Iterator<Item = (Owner<'_>, Range<u64>)> {
        let runs = self.known_table().within(range);
        runs.flat_map(|(owner, run)| {
            let whole = matches!(owner, Owner::Own).then(|| run.clone());
            let parts = self.plan.get().filter(|_| matches!(owner, Owner::Base(_)));
            let parts = parts
                .into_iter()
                .flat_map(move |plan| plan.own_within(run.clone()));
            whole.into_iter().chain(parts).map(move |run| (owner, run))
        })
    }

    /// What its file will hold, as ranges that rise and are apart.
    fn held(&self) -> Vec<Range<u64>> {
        let mut held: Vec<Range<u64>> = Vec::new();
        for (_, run) in self.coming(0..self.len) {
            match held.last_mut() {
                Some(last) if last.end == run.start => last.end = run.end,
                _ => held.push(run),
            }
        }
        held
    }

    /// Its own pages, as ranges that rise and are apart.
    pub(crate) fn own_pages(&self) -> Result<Vec<Range<u64>>, MemoryError> {
        let runs = self.table()?.within(0..self.len);
        let own = runs.filter(|(owner, _)| matches!(owner, Owner::Own));
        Ok(own.map(|(_, run)| run).collect())
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

    /// `mapper` maps it, and is to be told when it is whole. Whoever finds it whole after this call may
    /// have been told or not.
    pub(crate) fn map_by(&self, mapper: Weak<dyn Mapper>) {
        let mut mapped_by = self
            .mapped_by
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        mapped_by.retain(|mapper| mapper.strong_count() > 0);
        mapped_by.push(mapper);
    }

    /// Reads pages that are there.
    pub(crate) fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.store.read(offset, into)
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

    /// What other processes call it.
    pub(crate) fn name(&self) -> ImageName {
        self.name
    }

    /// Why what it holds cannot be relied on.
    pub(crate) fn spoiled(&self) -> Option<&SourceError> {
        self.filling.as_ref()?.spoiled.get()
    }

    /// How its faults are served, if it may have any.
    pub(crate) fn served(&self) -> Option<&FaultConfig> {
        Some(&self.filling.as_ref()?.config)
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

/// An image before it is known what belongs into it: made ahead of a pause, or taken over.
pub(crate) struct EmptyImage {
    name: ImageName,
    len: u64,
    store: Store,
    elsewhere: bool,
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
            name: ImageName::new(),
            len,
            store: Store::empty(len)?,
            elsewhere: false,
            config,
            counters,
            notices,
        })
    }
}

/// Whether `range` names whole pages, one at least, of a memory of `len` bytes.
pub(crate) fn are_pages(range: &Range<u64>, len: u64) -> bool {
    let whole = range.start.is_multiple_of(PAGE) && range.end.is_multiple_of(PAGE);
    whole && range.start < range.end && range.end <= len
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
