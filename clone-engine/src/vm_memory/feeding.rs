//! What a VM gives to images: kept from its own writes until it is there.

use super::*;

/// Images that a VM may feed at a time. They share one write-protect bit per page, so each fault
/// copies the page once for each of them.
const MOST_FEEDS: usize = 2;

impl VmMemory {
    /// Has a userfaultfd watch the VM's memory for `what` from now on.
    pub(crate) fn watch(
        self: &Arc<Self>,
        faults: &FaultHandler,
        what: Watch,
    ) -> Result<(), UserfaultError> {
        let mut feeds = self.feeds.write().unwrap_or_else(PoisonError::into_inner);
        self.watch_also(&mut feeds, faults, what)
    }

    pub(super) fn watch_also(
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

    /// A page that cannot be had costs those that touch it, and nobody else: the others are brought first.
    fn complete_fed(&self, image: &Arc<MemoryImage>) {
        if let Err(why) = image.fill_own() {
            image.give_up(self.left_out(image, &why));
        }
        image.settle();
    }

    /// Why `image` has to do without pages of this VM: `why` is that of the first, or of all.
    fn left_out(&self, image: &MemoryImage, why: &SourceError) -> SourceError {
        let name = format!("VM {}", self.name);
        match why {
            SourceError::Gone { .. } => {
                let why = why.to_string();
                SourceError::Gone { name, why }
            }
            SourceError::Damaged { offset, .. }
            | SourceError::Rubbish { offset, .. }
            | SourceError::Insert { offset, .. } => SourceError::Damaged {
                name,
                offset: *offset,
                why: format!("{why}; pages lost for good: {}", image.own_left()),
            },
        }
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
}
