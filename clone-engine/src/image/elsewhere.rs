//! An image that another process fills: the pages come into its file there, and its source here only
//! says which have come.
//!
//! Which page is whose is for that process to know; here a page is zero, or it is asked for. Made of
//! what a fork point's descriptor says ([`super::outline`]); used by workers, and by the engine for
//! what workers have forked.

use super::*;

impl EmptyImage {
    /// Of `file`, which is filled elsewhere.
    pub(crate) fn elsewhere(
        name: ImageName,
        file: Arc<File>,
        len: u64,
        config: FaultConfig,
        counters: Arc<FaultCounters>,
        notices: Sender<Notice>,
    ) -> EmptyImage {
        EmptyImage {
            name,
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
        for (_, run) in self.coming(range.clone()) {
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

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;
    use crate::source::PageSink;

    const LEN: u64 = 64 * PAGE;

    fn pages(range: Range<u64>) -> Range<u64> {
        range.start * PAGE..range.end * PAGE
    }

    fn memfd() -> Arc<File> {
        Arc::new(memory::memfd(c"test", LEN).unwrap())
    }

    struct Silent;

    impl PageSource for Silent {
        fn name(&self) -> String {
            "silent".into()
        }

        fn fetch(&self, _: &[Range<u64>], _: &mut dyn PageSink) -> Result<(), SourceError> {
            Ok(())
        }
    }

    /// Pages 40 and 44 are its own, all others of an earlier image; its clones look for those between them in
    /// it too, and for the rest in the earlier one.
    fn image() -> Arc<MemoryImage> {
        let base = MemoryImage::whole(memfd(), LEN);
        let own = [pages(40..41), pages(44..45)];
        let below = OwnerTable::own(LEN, &[pages(0..64)]).of(&base);
        let plan = Plan::over(&[(0..LEN, base)], &own, LEN, 1);
        let (notices, _) = channel();
        let (config, counters) = (FaultConfig::default(), Arc::new(FaultCounters::new()));
        let name = ImageName::new();
        let empty = EmptyImage::elsewhere(name, memfd(), LEN, config, counters, notices);
        let image = MemoryImage::filling(empty, below.with_own(&own), Arc::new(Silent));
        image.publish(plan).unwrap();
        image
    }

    #[test]
    fn it_holds_what_its_clones_look_for_in_it_and_no_more() {
        let image = image();
        assert_eq!(image.held(), [pages(40..45)]);
        assert_eq!(image.own_left(), 5);
        assert!(image.lacks(&pages(0..64)));
        assert!(!image.lacks(&pages(0..40)), "nobody looks for them here");
    }

    #[test]
    fn it_is_whole_when_the_last_of_those_has_come() {
        let image = image();
        for (range, left) in [
            (0..40, 5),
            (42..44, 3),
            (40..44, 1),
            (42..44, 1),
            (0..64, 0),
        ] {
            assert!(!image.is_whole());
            assert!(image.came_elsewhere(&pages(range)));
            assert_eq!(image.own_left(), left);
        }
        assert!(image.is_whole());
        assert!(!image.came_elsewhere(&(1..PAGE)), "these are no pages");
    }
}
