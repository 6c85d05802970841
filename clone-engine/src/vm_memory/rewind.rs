//! Back to what the image holds: all that a clone has written is dropped.

use super::*;

impl VmMemory {
    /// Drops every page of its own, those that it gave back included: what lies below shows again. The
    /// VM stands still and feeds nothing ([`complete_feeds`](VmMemory::complete_feeds)). What is
    /// registered stays so: a page that the image misses still raises a fault.
    pub(crate) fn rewind(&self, ram: &Ram) -> Result<(), Break> {
        let feeds = self.feeds.write().unwrap_or_else(PoisonError::into_inner);
        let protects = matches!(feeds.watch, Some(Watch::Written | Watch::MissingAndWritten));
        let mappings = self.mappings();
        for range in &self.ranges {
            let region = range.offset..range.end();
            if protects {
                // Dropped while protected, a page would leave a mark that looks like a page of its own.
                self.in_mappings(&mappings, &region, |shard, part| {
                    shard.userfault.unprotect(part)
                })?;
            }
            ram.drop_pages(&region)?;
        }
        self.under
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .given_back
            .clear();
        drop(feeds);
        Ok(())
    }
}
