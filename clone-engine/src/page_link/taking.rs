//! Pages from the other end, for an image that is filled there: the own userfaultfd tells that a clone
//! misses one, the question goes out from the image's fetcher ([`crate::fault::fetcher`]), the answer says that
//! the page is in the image's file by now, and the clone is woken to find it there.

use std::mem;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Weak};
use std::time::Duration;

use super::message::PageMessage;
use super::{PageLink, lock};
use crate::fault::{FaultConfig, FaultHandler};
use crate::image::{Arriving, ImageName, MemoryImage, OutlineError};
use crate::source::{PageSink, PageSource, SourceError};

/// How much longer than the other end waits for a source it is waited for: the reason that it finds is the
/// better one.
const MORE_PATIENCE: u32 = 2;

/// How long the other end may take to hear what was said; a process that runs hears at once.
const STANDS_STILL: Duration = Duration::from_secs(120);

/// What an image of the other end is here; it may have come twice at the same time.
pub(super) type Taken = Vec<Weak<MemoryImage>>;

/// Hears whether what was asked for came.
pub(super) type Asked = Sender<Result<(), SourceError>>;

/// The other end, as the source of one image.
pub(crate) struct FilledThere {
    link: Arc<PageLink>,
    image: ImageName,
    /// Whether the other end was told that the image is mapped here.
    watches: AtomicBool,
}

impl PageLink {
    /// Has an image that arrives unfinished be filled by the other end, and served by `faults`.
    pub(crate) fn take_over(
        self: &Arc<Self>,
        faults: &FaultHandler,
        arriving: Arriving,
    ) -> Result<Arc<MemoryImage>, OutlineError> {
        let name = arriving.name;
        let config = FaultConfig {
            page_deadline: arriving.config.page_deadline.saturating_mul(MORE_PATIENCE),
            ..arriving.config
        };
        let source = Arc::new(self.filled_there(name));
        let image = faults.image_elsewhere(Arriving { config, ..arriving }, source.clone())?;
        {
            let mut taken = lock(&self.taken);
            taken.retain(|_, images| {
                images.retain(|image| image.strong_count() > 0);
                !images.is_empty()
            });
            taken.entry(name).or_default().push(Arc::downgrade(&image));
        }
        // Only now: the answer may come at once. Without the other end there is nothing to know.
        source.watches.store(true, Ordering::Release);
        self.say(&PageMessage::Watch { image: name });
        Ok(image)
    }

    /// The pages of an image that the other end fills.
    pub(crate) fn filled_there(self: &Arc<Self>, image: ImageName) -> FilledThere {
        FilledThere {
            link: self.clone(),
            image,
            watches: AtomicBool::new(false),
        }
    }

    /// Waits until the other end has heard all that was said: it keeps images from then on for as long as
    /// they are mapped here. One that does not for long is given up.
    pub(crate) fn flush(&self) -> Result<(), SourceError> {
        let answer = self.ask(|request| PageMessage::Flush { request });
        answer.recv_timeout(STANDS_STILL).unwrap_or_else(|_silent| {
            self.close();
            Err(self.gone())
        })
    }

    /// Says what has an answer, and where that comes; nothing comes from an end that has gone.
    fn ask(&self, message: impl FnOnce(u64) -> PageMessage) -> Receiver<Result<(), SourceError>> {
        let request = self.requests.fetch_add(1, Ordering::Relaxed);
        let (asked, answer) = channel();
        lock(&self.asked).insert(request, asked);
        if !self.say(&message(request)) {
            lock(&self.asked).remove(&request);
        }
        answer
    }

    pub(super) fn came(&self, request: u64, outcome: Result<(), SourceError>) {
        let asked = lock(&self.asked).remove(&request);
        if let Some(Err(_gone)) = asked.map(|asked| asked.send(outcome)) {
            tracing::trace!(request, "nobody waits for these pages any more");
        }
    }

    pub(super) fn whole(&self, image: ImageName) {
        self.each(image, |image| image.whole_elsewhere());
    }

    pub(super) fn lost(&self, image: ImageName, why: &SourceError) {
        self.each(image, |image| image.spoil(why));
    }

    fn each(&self, name: ImageName, act: impl Fn(&MemoryImage)) {
        let images = lock(&self.taken).remove(&name).unwrap_or_default();
        let images = images.iter().filter_map(Weak::upgrade);
        images.for_each(|image| act(&image));
    }

    /// The other end has gone: whoever waits for its pages hears so.
    pub(super) fn give_up_taken(&self) {
        let asked = mem::take(&mut *lock(&self.asked));
        drop(asked);
        let taken = mem::take(&mut *lock(&self.taken));
        let images = taken.values().flatten().filter_map(Weak::upgrade);
        images.for_each(|image| image.give_up(self.gone()));
    }
}

impl PageSource for FilledThere {
    fn name(&self) -> String {
        self.link.peer.clone()
    }

    fn fetch(&self, ranges: &[Range<u64>], sink: &mut dyn PageSink) -> Result<(), SourceError> {
        let answer = self.link.ask(|request| PageMessage::Want {
            request,
            image: self.image,
            ranges: ranges.to_vec(),
        });
        answer.recv().map_err(|_closed| self.link.gone())??;
        ranges
            .iter()
            .try_for_each(|range| sink.there(range.clone()))
    }
}

impl Drop for FilledThere {
    fn drop(&mut self) {
        if *self.watches.get_mut() {
            self.link.say(&PageMessage::Leave { image: self.image });
        }
    }
}
