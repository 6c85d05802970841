//! The memory of one VM, as the engine sees it: which images lie under it, which it feeds, and what
//! becomes of its page faults.
//!
//! A VM *maps* images if it is a clone, or was remapped: a page that it misses is brought by the
//! image that is mapped there ([`VmMemory::missing`]). A VM *feeds* images if it was forked by a
//! freeze that copies nothing: a page that it is about to write is first brought into every image
//! that needs it ([`VmMemory::written`]). Both are called by the fault threads; neither ever waits.
//!
//! One lock orders it all: `feeds`. Held for reading while pages of this VM are read for an image or
//! a protection is lifted, for writing while an image is added, while pages are given back and while
//! protections change as a whole. So a protection is never lifted for an image that was just added,
//! and a page is never read while it is being dropped. It is never held across an access to guest
//! memory that could fault for want of a page: only pages that are there are read under it.

mod faults;
mod feeding;
mod give_back;
mod mappings;
mod rewind;

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, Weak};
use std::time::Instant;

use forkvm_devices::Brake;
use forkvm_vmm::memory::{Base, Held, PAGE, Piece};
use forkvm_vmm::{MemoryError, Ram};
use roaring::RoaringBitmap;
use vm_memory::VolatileSlice;

use crate::fault::counters::Cause;
use crate::fault::fetcher::Waiter;
use crate::fault::readahead::Readahead;
use crate::fault::shard::Shard;
use crate::fault::{FaultHandler, Notice};
use crate::image::{
    Content, EmptyImage, Mapper, MemoryImage, OwnerTable, Provided, complete, distinct,
};
use crate::rewind::Break;
use crate::source::SourceError;
use crate::userfault::{UserfaultError, Watch};
use crate::working_set::{Recorder, WorkingSet};

pub(crate) use faults::MOST_HANDLER_DEATHS;
use mappings::HostRange;

/// Zero pages are mapped up to the next multiple of this at once.
const ZERO_BLOCK: u64 = 2 << 20;

/// Told when a page of the VM can never be had; ends the VM.
pub(crate) type Lose = Box<dyn Fn(&SourceError) + Send + Sync>;

/// See the module's text. Offsets are file offsets of RAM in bytes.
pub(crate) struct VmMemory {
    name: String,
    /// Keeps the addresses below from being another VM's.
    _addresses: Held,
    ranges: Vec<HostRange>,
    under: RwLock<Under>,
    feeds: RwLock<Feeds>,
    /// Whose userfaultfd watches it, once one does.
    shard: OnceLock<Arc<Shard>>,
    notices: Sender<Notice>,
    lose: Lose,
    /// Of the fault thread alone.
    readahead: Mutex<Readahead>,
    /// Where its first touches are recorded, of a clone.
    touches: OnceLock<Arc<Recorder>>,
    /// What the clones of its last lazy fork point touched first.
    touched_by_clones: Mutex<Arc<Recorder>>,
    brake: OnceLock<Brake>,
    lost: AtomicBool,
    abandoned: AtomicBool,
    /// Fault threads that died of a fault of this VM.
    handlers_died: AtomicU32,
    /// Fault threads that a test has die of writes of this VM.
    #[cfg(test)]
    pub(crate) deaths_by_writes: AtomicU32,
}

/// What lies under a private mapping. Empty for a VM that maps its own memory shared.
#[derive(Default)]
struct Under {
    image: Option<Arc<MemoryImage>>,
    /// Rising, without gap.
    mapped: Vec<(Range<u64>, Arc<MemoryImage>)>,
    /// Pages that were given back: they are zero, whatever the image holds. By page number.
    given_back: RoaringBitmap,
}

#[derive(Default)]
struct Feeds {
    /// The oldest first.
    images: Vec<Weak<MemoryImage>>,
    watch: Option<Watch>,
    /// The VM is being torn down.
    closed: bool,
}

impl VmMemory {
    /// Of a VM that maps its own memory shared.
    pub(crate) fn new(
        name: &str,
        ram: &mut Ram,
        faults: &FaultHandler,
        lose: Lose,
    ) -> Arc<VmMemory> {
        let ranges = ram.host_ranges().map(|(region, address)| HostRange {
            offset: region.offset,
            len: region.len,
            address: address as u64,
        });
        let memory = Arc::new(VmMemory {
            name: name.to_owned(),
            _addresses: ram.hold_addresses(),
            ranges: ranges.collect(),
            under: RwLock::default(),
            feeds: RwLock::default(),
            shard: OnceLock::new(),
            notices: faults.notices(),
            lose,
            readahead: Mutex::new(faults.readahead()),
            touches: OnceLock::new(),
            touched_by_clones: Mutex::default(),
            brake: OnceLock::new(),
            lost: AtomicBool::new(false),
            abandoned: AtomicBool::new(false),
            handlers_died: AtomicU32::new(0),
            #[cfg(test)]
            deaths_by_writes: AtomicU32::new(0),
        });
        let watched = memory.clone();
        ram.when_closed(move || watched.wake_everybody());
        memory
    }

    /// Of a clone of `image`, whose `ram` maps what [`ImageBase`] of it says.
    pub(crate) fn of_clone(
        name: &str,
        ram: &mut Ram,
        image: &Arc<MemoryImage>,
        faults: &FaultHandler,
        lose: Lose,
    ) -> Result<Arc<VmMemory>, UserfaultError> {
        let memory = VmMemory::new(name, ram, faults, lose);
        if let Some(served) = image.served() {
            *memory.readahead() = served.readahead();
        }
        memory.now_maps(image);
        // Before the look at what is missing: who completes meanwhile finds it in the list.
        let mapped = memory.mapped();
        let mapper: Weak<VmMemory> = Arc::downgrade(&memory);
        distinct(&mapped).for_each(|image| image.map_by(mapper.clone()));
        if !memory.is_whole() {
            memory.watch(faults, Watch::Missing)?;
        }
        Ok(memory)
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The VM, which stands still and feeds nothing, was mapped anew in place: it maps `image`, alone
    /// or with those of its line, or its own memory shared.
    pub(crate) fn remapped(&self, image: Option<&Arc<MemoryImage>>) {
        // Nothing watches a new mapping.
        self.feeds
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .watch = None;
        match image {
            Some(image) => self.now_maps(image),
            None => {
                *self.under.write().unwrap_or_else(PoisonError::into_inner) = Under::default();
            }
        }
    }

    fn now_maps(&self, image: &Arc<MemoryImage>) {
        *self.under.write().unwrap_or_else(PoisonError::into_inner) = Under {
            image: Some(image.clone()),
            mapped: image.mapped(),
            given_back: RoaringBitmap::new(),
        };
    }

    fn under(&self) -> std::sync::RwLockReadGuard<'_, Under> {
        self.under.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Which image is mapped where.
    pub(crate) fn mapped(&self) -> Vec<(Range<u64>, Arc<MemoryImage>)> {
        self.under().mapped.clone()
    }

    /// Who holds the pages that this VM has not written: the images of its line.
    pub(crate) fn table(&self) -> Result<Option<OwnerTable>, MemoryError> {
        let under = self.under();
        let Some(image) = &under.image else {
            return Ok(None);
        };
        let table = image.table()?.of(image);
        Ok(Some(if under.given_back.is_empty() {
            table
        } else {
            table.with_zero(&page_ranges(&under.given_back))
        }))
    }

    /// What was given back, as ranges.
    pub(crate) fn given_back(&self) -> Vec<Range<u64>> {
        page_ranges(&self.under().given_back)
    }

    fn is_whole(&self) -> bool {
        self.under()
            .mapped
            .iter()
            .all(|(_, image)| image.is_whole())
    }

    /// Has its first touches recorded from now on.
    pub(crate) fn record(&self, recorder: Arc<Recorder>) {
        self.touches.get_or_init(|| recorder);
    }

    /// Where its first touches are recorded.
    pub(crate) fn touches(&self) -> Option<Arc<Recorder>> {
        self.touches.get().cloned()
    }

    /// A record for the clones of the next fork point of this VM, and what is known before of what
    /// they will touch.
    pub(crate) fn expect_touches(&self) -> (WorkingSet, Arc<Recorder>) {
        let mut last = self
            .touched_by_clones
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let known = last.working_set();
        *last = Recorder::after(&known);
        (known, last.clone())
    }

    /// Brings all that the images under it miss, waiting for it.
    pub(crate) fn complete(&self) -> Result<(), SourceError> {
        complete(&self.mapped())
    }
}

impl Drop for VmMemory {
    fn drop(&mut self) {
        if let Some(shard) = self.shard.get() {
            shard.remove(self.ranges.iter().map(|range| range.host()));
        }
    }
}

/// What the private mapping of a clone of an image hangs on.
#[derive(Debug)]
pub(crate) struct ImageBase {
    pub(crate) image: Arc<MemoryImage>,
}

impl Base for ImageBase {
    fn pieces(&self, _len: u64) -> Vec<Piece> {
        let mapped = self.image.mapped().into_iter();
        let piece = |(range, image): (Range<u64>, Arc<MemoryImage>)| Piece {
            range,
            file: image.file().clone(),
        };
        mapped.map(piece).collect()
    }

    fn populated(&self) -> Result<Vec<Range<u64>>, MemoryError> {
        Ok(self.image.table()?.populated())
    }
}

fn page_ranges(pages: &RoaringBitmap) -> Vec<Range<u64>> {
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for page in pages {
        let start = u64::from(page) * PAGE;
        match ranges.last_mut() {
            Some(last) if last.end == start => last.end += PAGE,
            _ => ranges.push(start..start + PAGE),
        }
    }
    ranges
}
