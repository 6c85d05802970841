//! What becomes of a page fault of a VM. Called by the fault threads; nothing here waits.

use super::*;

/// Pages that are copied and unprotected together when one of them is written.
const WRITE_CHUNK: u64 = 16 * PAGE;

/// Deaths of fault threads after which the VM whose faults they were is to blame.
pub(crate) const MOST_HANDLER_DEATHS: u32 = 3;

impl VmMemory {
    /// Answers a fault at the page `offset`. Whether pages should be brought ahead of the VM.
    pub(crate) fn answer(self: &Arc<Self>, shard: &Shard, offset: u64, written: bool) -> bool {
        let answered = if written {
            self.written(shard, offset).map(|()| false)
        } else {
            self.missing(shard, offset)
        };
        answered.unwrap_or_else(|error| {
            tracing::error!(vm = self.name, error = %error, "a page fault could not be answered");
            let why = error.to_string();
            self.lost(&SourceError::Insert { offset, why });
            false
        })
    }

    /// The VM misses a page.
    fn missing(self: &Arc<Self>, shard: &Shard, offset: u64) -> Result<bool, UserfaultError> {
        if self.abandoned.load(Ordering::Acquire) {
            // In its own mapping only: its threads get out, nobody else sees it.
            let page = self.host(&(offset..offset + PAGE));
            return shard.userfault.zero(&page).map(|_zeroed| false);
        }
        let since = Instant::now();
        let Some((mapping, image)) = self.image_at(offset) else {
            let page = self.host(&(offset..offset + PAGE));
            return shard.userfault.wake(&page).map(|()| false);
        };
        let waiter: Arc<dyn Waiter> = self.clone();
        match image.provide(offset, &waiter) {
            Ok(Provided::Here(range)) => {
                shard.counters.took(since.elapsed());
                shard.userfault.wake(&self.host(&range))?;
                Ok(self.missed(&mapping, &range))
            }
            Ok(Provided::Zero(range)) => {
                shard.counters.count_zero();
                let block = (offset / ZERO_BLOCK + 1) * ZERO_BLOCK;
                let end = range.end.min(block).min(mapping.end);
                let part = offset..end.min(self.range_of(offset).end());
                shard.userfault.zero(&self.host(&part)).map(|_zeroed| false)
            }
            Ok(Provided::Coming(range)) => Ok(self.missed(&mapping, &range)),
            Err(why) => {
                self.lost(&why);
                Ok(false)
            }
        }
    }

    /// A fault has brought `range`. Whether pages should be brought ahead of the next.
    fn missed(&self, mapping: &Range<u64>, range: &Range<u64>) -> bool {
        self.touched(range);
        let end = mapping.end.min(self.range_of(range.start).end());
        self.readahead().missed(range, end)
    }

    /// Brings a chunk that the VM will probably touch soon. Whether there is more of it.
    pub(crate) fn read_ahead(&self) -> bool {
        let Some(range) = self.readahead().next() else {
            return false;
        };
        let Some((_, image)) = self.image_at(range.start) else {
            return false;
        };
        // As good as touched: whoever reads on does not fault there.
        match image.provide_ahead(&range, |brought| self.touched(brought)) {
            Ok(()) => true,
            Err(why) => {
                // Whoever touches it will hear of it.
                tracing::debug!(%why, vm = self.name, "nothing is brought ahead");
                self.readahead().stop();
                false
            }
        }
    }

    fn touched(&self, range: &Range<u64>) {
        if let Some(touches) = self.touches.get() {
            touches.touched(range);
        }
    }

    pub(super) fn readahead(&self) -> MutexGuard<'_, Readahead> {
        self.readahead
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
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
            #[cfg(test)]
            self.die_of_write();
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

    /// Where a test has fault threads die: the page is in one image, perhaps not in the next, and its
    /// protection is not lifted.
    #[cfg(test)]
    fn die_of_write(&self) {
        let one_less = |left: u32| left.checked_sub(1);
        let deaths = &self.deaths_by_writes;
        let died = deaths.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less);
        if died.is_ok() {
            std::panic::resume_unwind(Box::new("as the test says"));
        }
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

    pub(super) fn wake_everybody(&self) {
        if let Some(shard) = self.shard.get() {
            self.wake_all(shard);
        }
    }
}

impl Mapper for VmMemory {
    fn whole(&self) {
        self.relax();
    }

    fn lost(&self, why: &SourceError) {
        VmMemory::lost(self, why);
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
