//! An image that another process fills: the pages come into its file there, and its source here only
//! says which have come.
//!
//! Which page is whose is for that process to know; here a page is zero, or it is asked for. Made of
//! what a fork point's descriptor says ([`super::outline`]); used by workers.

use super::*;

impl EmptyImage {
    /// Of `file`, which is filled elsewhere.
    pub(crate) fn elsewhere(
        file: Arc<File>,
        len: u64,
        config: FaultConfig,
        counters: Arc<FaultCounters>,
        notices: Sender<Notice>,
    ) -> EmptyImage {
        EmptyImage {
            len,
            store: Store::whole(file),
            elsewhere: true,
            config,
            counters,
            notices,
        }
    }
}

impl MemoryImage {
    /// The pages of `range` are in the file. Whether that can be: whether the image is filled elsewhere,
    /// and has such pages.
    pub(crate) fn came_elsewhere(&self, range: &Range<u64>) -> bool {
        let sound = are_pages(range, self.len);
        let Some(filling) = self.filling.as_ref().filter(|f| f.elsewhere && sound) else {
            return false;
        };
        for (owner, run) in self.known_table().within(range.clone()) {
            if matches!(owner, Owner::Zero) {
                continue;
            }
            let new = filling.present.set(&run);
            let last = new > 0 && filling.own_left.fetch_sub(new, Ordering::AcqRel) == new;
            if last && filling.notices.send(Notice::LastPage).is_err() {
                tracing::trace!("an image filled up after its family's end");
            }
        }
        true
    }

    /// Nothing is missing in the file any more. What follows from that is the supervisor's.
    pub(crate) fn whole_elsewhere(&self) {
        self.came_elsewhere(&(0..self.len));
    }
}
