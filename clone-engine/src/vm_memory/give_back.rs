//! Giving pages back to the host: the one way in which a VM's memory loses pages.

use super::*;

impl VmMemory {
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
