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
#![allow(unsafe_code)] // A slice of guest memory by address.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, OnceLock, PoisonError, RwLock, Weak};
use std::time::Instant;

use forkvm_devices::{Brake, GuestMemory};
use forkvm_vmm::memory::{Base, PAGE, Piece};
use forkvm_vmm::{MemoryError, Ram};
use roaring::RoaringBitmap;
use vm_memory::VolatileSlice;

use crate::fault::counters::Cause;
use crate::fault::fetcher::Waiter;
use crate::fault::shard::Shard;
use crate::fault::{FaultHandler, Notice};
use crate::image::{
    Content, EmptyImage, MemoryImage, OwnerTable, Provided, Which, complete, distinct,
};
use crate::source::SourceError;
use crate::userfault::{UserfaultError, Watch};

/// Pages that are copied and unprotected together when one of them is written.
const WRITE_CHUNK: u64 = 16 * PAGE;

/// Zero pages are mapped up to the next multiple of this at once.
const ZERO_BLOCK: u64 = 2 << 20;

/// Images that a VM may feed at a time. They share one write-protect bit per page, so each fault
/// copies the page once for each of them.
const MOST_FEEDS: usize = 2;

/// Deaths of fault threads after which the VM whose faults they were is to blame.
const MOST_HANDLER_DEATHS: u32 = 3;

/// Told when a page of the VM can never be had; ends the VM.
pub(crate) type Lose = Box<dyn Fn(&SourceError) + Send + Sync>;

/// See the module's text. Offsets are file offsets of RAM in bytes.
pub(crate) struct VmMemory {
    name: String,
    /// Keeps the addresses below mapped.
    _guest: GuestMemory,
    ranges: Vec<HostRange>,
    under: RwLock<Under>,
    feeds: RwLock<Feeds>,
    /// Whose userfaultfd watches it, once one does.
    shard: OnceLock<Arc<Shard>>,
    notices: Sender<Notice>,
    lose: Lose,
    brake: OnceLock<Brake>,
    lost: AtomicBool,
    abandoned: AtomicBool,
    /// Fault threads that died of a fault of this VM.
    handlers_died: AtomicU32,
}

/// One region of RAM in this process.
#[derive(Clone, Copy, Debug)]
struct HostRange {
    offset: u64,
    len: u64,
    address: u64,
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
            _guest: ram.guest().clone(),
            ranges: ranges.collect(),
            under: RwLock::default(),
            feeds: RwLock::default(),
            shard: OnceLock::new(),
            notices: faults.notices(),
            lose,
            brake: OnceLock::new(),
            lost: AtomicBool::new(false),
            abandoned: AtomicBool::new(false),
            handlers_died: AtomicU32::new(0),
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
        memory.now_maps(image);
        // Before the look at what is missing: who completes meanwhile finds it in the list.
        let mapped = memory.mapped();
        distinct(&mapped).for_each(|image| image.map_by(&memory));
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

    /// Brings all that the images under it miss, waiting for it.
    pub(crate) fn complete(&self) -> Result<(), SourceError> {
        complete(&self.mapped())
    }

    // Feeding.

    /// Has a userfaultfd watch the VM's memory for `what` from now on.
    pub(crate) fn watch(
        self: &Arc<Self>,
        faults: &FaultHandler,
        what: Watch,
    ) -> Result<(), UserfaultError> {
        let mut feeds = self.feeds.write().unwrap_or_else(PoisonError::into_inner);
        self.watch_also(&mut feeds, faults, what)
    }

    fn watch_also(
        self: &Arc<Self>,
        feeds: &mut Feeds,
        faults: &FaultHandler,
        what: Watch,
    ) -> Result<(), UserfaultError> {
        let both = match (feeds.watch, what) {
            (None, what) => what,
            (Some(now), what) if now == what || now == Watch::MissingAndWritten => return Ok(()),
            _ => Watch::MissingAndWritten,
        };
        if self.shard.get().is_none() {
            let shard = faults.shard()?;
            shard.add(
                self,
                self.ranges.iter().map(|range| (range.host(), range.offset)),
            );
            // Only here, under the lock.
            self.shard.get_or_init(|| shard);
        }
        if let Some(shard) = self.shard.get() {
            for range in &self.ranges {
                shard.userfault.register(&range.host(), both)?;
            }
        }
        feeds.watch = Some(both);
        Ok(())
    }

    /// Makes room for one more image to feed: completes the oldest where there are too many. The VM
    /// runs meanwhile.
    pub(crate) fn make_room(&self) {
        let fed = self.fed_images();
        for image in fed.iter().take((fed.len() + 1).saturating_sub(MOST_FEEDS)) {
            self.complete_fed(image);
        }
    }

    /// Brings what it feeds into every image: nobody needs this memory afterwards. Before the VM is
    /// torn down or its memory mapped anew.
    pub(crate) fn complete_feeds(&self) {
        self.fed_images()
            .iter()
            .for_each(|image| self.complete_fed(image));
    }

    fn complete_fed(&self, image: &Arc<MemoryImage>) {
        if let Err(why) = image.fill_all(Which::Own) {
            let (name, why) = (format!("VM {}", self.name), why.to_string());
            image.give_up(SourceError::Gone { name, why });
        }
        image.settle();
    }

    /// Images that still need pages of this VM, the oldest first.
    fn fed_images(&self) -> Vec<Arc<MemoryImage>> {
        let feeds = self.feeds.read().unwrap_or_else(PoisonError::into_inner);
        let images = feeds.images.iter().filter_map(Weak::upgrade);
        images.filter(|image| image.is_fed_by_somebody()).collect()
    }

    /// An image of this instant whose own pages are `pages` of this VM, which stands still. With
    /// `protect` it may run on afterwards.
    pub(crate) fn feed(
        self: &Arc<Self>,
        faults: &FaultHandler,
        empty: EmptyImage,
        table: OwnerTable,
        source: Arc<dyn crate::source::PageSource>,
        protect: Option<&[Range<u64>]>,
    ) -> Result<Arc<MemoryImage>, UserfaultError> {
        let image = MemoryImage::filling(empty, table, source);
        let mut feeds = self.feeds.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(protect) = protect {
            self.watch_also(&mut feeds, faults, Watch::Written)?;
            let mappings = self.mappings();
            // After an error what is protected already is unprotected by its first write.
            for pages in protect {
                self.in_mappings(&mappings, pages, |shard, part| {
                    shard.userfault.protect(part)
                })?;
            }
        }
        feeds.images.push(Arc::downgrade(&image));
        Ok(image)
    }

    /// Takes [`feed`](Self::feed) back: the VM has not run since.
    pub(crate) fn unfeed(&self, image: &Arc<MemoryImage>) {
        let mut feeds = self.feeds.write().unwrap_or_else(PoisonError::into_inner);
        feeds
            .images
            .retain(|fed| !std::ptr::eq(fed.as_ptr(), Arc::as_ptr(image)));
    }

    /// Shows pages that an image takes from this VM; they are not dropped meanwhile.
    /// Whether they are there to be shown.
    pub(crate) fn show(&self, range: &Range<u64>, show: &mut dyn FnMut(VolatileSlice<'_>)) -> bool {
        let feeds = self.feeds.read().unwrap_or_else(PoisonError::into_inner);
        if !feeds.closed {
            show(self.slice(range));
        }
        !feeds.closed
    }

    /// Nothing is taken from this memory any more: every image that it fed has what it needs, and
    /// whoever is late finds it there.
    pub(crate) fn close(&self) {
        self.complete_feeds();
        self.feeds
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .closed = true;
    }

    /// An image needs nothing more of this VM.
    pub(crate) fn fed(self: &Arc<Self>) {
        // Not here: whoever dropped the image may hold a lock of this VM.
        if self.notices.send(Notice::Fed(self.clone())).is_err() {
            tracing::trace!("an image was fed after its family's end");
        }
    }

    /// Ends what is watched for without need: protections once nothing is fed, missing pages once
    /// every image under the VM is whole.
    pub(crate) fn relax(&self) {
        let mut dropped_late = Vec::new();
        let mut feeds = self.feeds.write().unwrap_or_else(PoisonError::into_inner);
        feeds.images.retain(|image| {
            let image = image.upgrade();
            let needed = image
                .as_ref()
                .is_some_and(|image| image.is_fed_by_somebody());
            dropped_late.extend(image);
            needed
        });
        if feeds.images.is_empty()
            && let (Some(watch), Some(shard)) = (feeds.watch, self.shard.get())
        {
            let whole = self.is_whole();
            let mappings = self.mappings();
            let relaxed = self.ranges.iter().try_for_each(|range| match watch {
                _ if whole => shard.userfault.unregister(&range.host()),
                Watch::Missing => Ok(()),
                Watch::Written | Watch::MissingAndWritten => {
                    let region = range.offset..range.end();
                    self.in_mappings(&mappings, &region, |shard, part| {
                        shard.userfault.unprotect(part)
                    })
                }
            });
            match relaxed {
                Ok(()) if whole => feeds.watch = None,
                Ok(()) => {}
                // At worst its writes go on raising faults, which are answered.
                Err(error) => tracing::debug!(%error, vm = self.name, "still watched"),
            }
        }
        drop(feeds);
    }

    // Faults.

    /// Answers a fault at the page `offset`.
    pub(crate) fn answer(self: &Arc<Self>, shard: &Shard, offset: u64, written: bool) {
        let answered = if written {
            self.written(shard, offset)
        } else {
            self.missing(shard, offset)
        };
        if let Err(error) = answered {
            tracing::error!(vm = self.name, error = %error, "a page fault could not be answered");
            let why = error.to_string();
            self.lost(&SourceError::Insert { offset, why });
        }
    }

    /// The VM misses a page.
    fn missing(self: &Arc<Self>, shard: &Shard, offset: u64) -> Result<(), UserfaultError> {
        if self.abandoned.load(Ordering::Acquire) {
            // In its own mapping only: its threads get out, nobody else sees it.
            let page = self.host(&(offset..offset + PAGE));
            return shard.userfault.zero(&page).map(|_zeroed| ());
        }
        let since = Instant::now();
        let Some((mapping, image)) = self.image_at(offset) else {
            return shard.userfault.wake(&self.host(&(offset..offset + PAGE)));
        };
        let waiter: Arc<dyn Waiter> = self.clone();
        match image.provide(offset, &waiter) {
            Ok(Provided::Here(range)) => {
                shard.counters.took(since.elapsed());
                shard.userfault.wake(&self.host(&range))
            }
            Ok(Provided::Zero(range)) => {
                shard.counters.count_zero();
                let block = (offset / ZERO_BLOCK + 1) * ZERO_BLOCK;
                let end = range.end.min(block).min(mapping.end);
                let part = offset..end.min(self.range_of(offset).end());
                shard.userfault.zero(&self.host(&part)).map(|_zeroed| ())
            }
            Ok(Provided::Coming) => Ok(()),
            Err(why) => {
                self.lost(&why);
                Ok(())
            }
        }
    }

    /// The image that is mapped at `offset`, and how far.
    fn image_at(&self, offset: u64) -> Option<(Range<u64>, Arc<MemoryImage>)> {
        let under = self.under();
        let next = under
            .mapped
            .partition_point(|(range, _)| range.end <= offset);
        under.mapped.get(next).cloned()
    }

    /// The VM is about to write a protected page.
    fn written(&self, shard: &Shard, offset: u64) -> Result<(), UserfaultError> {
        let range = self.range_of(offset);
        let start = (offset - offset % WRITE_CHUNK).max(range.offset);
        let chunk = start..(start + WRITE_CHUNK).min(range.end());
        let feeds = self.feeds.read().unwrap_or_else(PoisonError::into_inner);
        let images: Vec<Arc<MemoryImage>> = feeds.images.iter().filter_map(Weak::upgrade).collect();
        let mut spoiled = Vec::new();
        for image in images.iter().filter(|image| !image.is_lost()) {
            let content = Content::from(self.slice(&chunk));
            if let Err(why) = image.take(&chunk, content, Cause::ParentWrite) {
                // The VM runs on; those that would see its write in place of the old page do not.
                image.mark_spoiled(&why);
                spoiled.push((image, why));
            }
        }
        let unprotected = self.in_mappings(&self.mappings(), &chunk, |_, part| {
            shard.userfault.unprotect(part)
        });
        drop(feeds);
        for (image, why) in spoiled {
            image.spoil(&why);
        }
        unprotected
    }

    /// Has everybody who waits for a page of this VM fault again.
    pub(crate) fn wake_all(&self, shard: &Shard) {
        for range in &self.ranges {
            if let Err(error) = shard.userfault.wake(&range.host()) {
                tracing::error!(%error, vm = self.name, "its vCPUs could not be woken");
            }
        }
    }

    /// The thread that answered a fault of this VM died of it. The fault will be raised again, but not
    /// for ever.
    pub(crate) fn handler_died(&self) {
        if self.handlers_died.fetch_add(1, Ordering::Relaxed) + 1 == MOST_HANDLER_DEATHS {
            self.lost(&SourceError::Gone {
                name: format!("the memory of VM {}", self.name),
                why: format!("the fault handler died of its faults {MOST_HANDLER_DEATHS} times"),
            });
        }
    }

    /// A page can never be had: the VM ends.
    pub(crate) fn lost(&self, why: &SourceError) {
        if self.lost.swap(true, Ordering::AcqRel) {
            return;
        }
        // Whoever serves the VM may itself wait for a page, so it is let out from here. In this order:
        // its devices do nothing any more, its end has a reason, and only then pages are made up.
        if let Some(brake) = self.brake.get() {
            brake.condemn();
        }
        (self.lose)(why);
        self.abandon();
    }

    /// The VM's memory is no longer what it was: the VM ends.
    pub(crate) fn lose_all(&self, why: &dyn std::error::Error) {
        let (name, why) = (format!("the memory of VM {}", self.name), why.to_string());
        self.lost(&SourceError::Gone { name, why });
    }

    /// What stops the devices of this VM.
    pub(crate) fn set_brake(&self, brake: Brake) {
        self.brake.get_or_init(|| brake);
    }

    /// The VM is being torn down: pages that it misses are zero from now on, in its own mapping, so
    /// that no thread of it is held up by a source. Its devices must do nothing any more.
    pub(crate) fn abandon(&self) {
        self.abandoned.store(true, Ordering::Release);
        self.wake_everybody();
    }

    fn wake_everybody(&self) {
        if let Some(shard) = self.shard.get() {
            self.wake_all(shard);
        }
    }

    // Giving pages back.

    /// Gives the pages of `range` back to the host; they read as zero from then on. They lie in one
    /// region. Returns how many pages were given back: one that is touched meanwhile stays.
    pub(crate) fn give_back(
        self: &Arc<Self>,
        ram: &Ram,
        faults: &FaultHandler,
        range: &Range<u64>,
    ) -> Result<u64, GiveBackError> {
        let mut given_back = 0;
        // By the piece, so that faults are answered in between.
        for start in range.clone().step_by(ZERO_BLOCK as usize) {
            let piece = start..(start + ZERO_BLOCK).min(range.end);
            given_back += self.give_back_piece(ram, faults, &piece)?;
        }
        Ok(given_back)
    }

    fn give_back_piece(
        self: &Arc<Self>,
        ram: &Ram,
        faults: &FaultHandler,
        piece: &Range<u64>,
    ) -> Result<u64, GiveBackError> {
        let private = ram.backing().shared().is_none();
        let mut feeds = self.feeds.write().unwrap_or_else(PoisonError::into_inner);
        if private {
            self.watch_also(&mut feeds, faults, Watch::Missing)?;
        }
        let images: Vec<Arc<MemoryImage>> = feeds.images.iter().filter_map(Weak::upgrade).collect();
        for image in images.iter().filter(|image| !image.is_lost()) {
            // First into every image that needs them: nothing tells of a page that was dropped.
            image.take(piece, Content::from(self.slice(piece)), Cause::ParentWrite)?;
        }
        if let Some(Watch::Written | Watch::MissingAndWritten) = feeds.watch {
            // Dropped while protected, a page would leave a mark that looks like a page of its own.
            self.in_mappings(&self.mappings(), piece, |shard, part| {
                shard.userfault.unprotect(part)
            })?;
        }
        ram.drop_pages(piece)?;
        let mut given_back = (piece.end - piece.start) / PAGE;
        if let (true, Some(shard)) = (private, self.shard.get()) {
            given_back = self.zero_dropped(shard, piece).inspect_err(|error| {
                // What lies below shows now, and the guest has been told nothing.
                self.lose_all(error);
            })?;
        }
        drop(feeds);
        drop(images);
        Ok(given_back)
    }

    /// Maps a zero page for each page of `piece`, unless the guest was faster: what lies below must
    /// not show.
    fn zero_dropped(&self, shard: &Shard, piece: &Range<u64>) -> Result<u64, UserfaultError> {
        let mut under = self.under.write().unwrap_or_else(PoisonError::into_inner);
        let mut zeroed = 0;
        for page in piece.clone().step_by(PAGE as usize) {
            if shard.userfault.zero(&self.host(&(page..page + PAGE)))? {
                under.given_back.insert((page / PAGE) as u32);
                zeroed += 1;
            }
        }
        Ok(zeroed)
    }

    // Addresses.

    fn range_of(&self, offset: u64) -> HostRange {
        let found = self.ranges.iter().find(|range| offset < range.end());
        *found.expect("an offset within the RAM")
    }

    /// Host addresses of `range`, which lies in one region.
    fn host(&self, range: &Range<u64>) -> Range<u64> {
        let within = self.range_of(range.start);
        let start = within.address + (range.start - within.offset);
        start..start + (range.end - range.start)
    }

    /// The kernel's mappings of this memory, as file offsets: a call of a userfaultfd that installs,
    /// protects or unprotects may not cross a border between two.
    fn mappings(&self) -> Vec<Range<u64>> {
        let under = self.under();
        let whole = 0..self.ranges.last().map_or(0, HostRange::end);
        let parts: Vec<Range<u64>> = match under.mapped.as_slice() {
            [] => vec![whole],
            mapped => mapped.iter().map(|(range, _)| range.clone()).collect(),
        };
        let cut = |part: &Range<u64>| {
            let part = part.clone();
            self.ranges.iter().filter_map(move |range| {
                let both = part.start.max(range.offset)..part.end.min(range.end());
                (!both.is_empty()).then_some(both)
            })
        };
        parts.iter().flat_map(cut).collect()
    }

    /// Calls `each` for the host addresses of `range`, cut to `mappings`.
    fn in_mappings(
        &self,
        mappings: &[Range<u64>],
        range: &Range<u64>,
        each: impl Fn(&Shard, &Range<u64>) -> Result<(), UserfaultError>,
    ) -> Result<(), UserfaultError> {
        let Some(shard) = self.shard.get() else {
            return Ok(());
        };
        let first = mappings.partition_point(|mapping| mapping.end <= range.start);
        let met = mappings[first..]
            .iter()
            .take_while(|mapping| mapping.start < range.end);
        for mapping in met {
            let part = range.start.max(mapping.start)..range.end.min(mapping.end);
            each(shard, &self.host(&part))?;
        }
        Ok(())
    }

    /// The bytes of `range`, which lies in one region.
    fn slice(&self, range: &Range<u64>) -> VolatileSlice<'_> {
        let host = self.host(range);
        // SAFETY: the range lies in a region that `_guest` keeps mapped; others write it meanwhile,
        // which is what volatile access is for.
        unsafe { VolatileSlice::new(host.start as *mut u8, (host.end - host.start) as usize) }
    }
}

impl Waiter for VmMemory {
    fn arrived(&self, range: &Range<u64>) {
        if let Some(shard) = self.shard.get()
            && let Err(error) = shard.userfault.wake(&self.host(range))
        {
            tracing::error!(%error, vm = self.name, "its vCPUs could not be woken");
        }
    }

    fn lost(&self, why: &SourceError) {
        VmMemory::lost(self, why);
    }
}

impl Drop for VmMemory {
    fn drop(&mut self) {
        if let Some(shard) = self.shard.get() {
            shard.remove(self.ranges.iter().map(|range| range.host()));
        }
    }
}

impl HostRange {
    fn end(&self) -> u64 {
        self.offset + self.len
    }

    fn host(&self) -> Range<u64> {
        self.address..self.address + self.len
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

/// Why pages could not be given back.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GiveBackError {
    #[error(transparent)]
    Userfault(#[from] UserfaultError),
    #[error(transparent)]
    Image(#[from] SourceError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
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
