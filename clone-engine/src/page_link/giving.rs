//! Pages for the other end, and news of their images: what is asked for is brought as for a clone of this
//! process. What waits for a far source is answered by whoever hears from it; nothing here waits.

use std::mem;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use super::message::PageMessage;
use super::{PageLink, lock};
use crate::fault::fetcher::Waiter;
use crate::image::{ImageName, Mapper, MemoryImage, are_pages};
use crate::source::SourceError;
use crate::vm_memory::MOST_HANDLER_DEATHS;
use crate::working_set::Recorder;

/// An image that the other end may ask for.
pub(super) struct Offer {
    image: Weak<MemoryImage>,
    /// The same, while it is mapped there.
    held: Option<Arc<MemoryImage>>,
    /// How often it is mapped there. An image that is whole at once may leave before it says that it is
    /// there.
    watchers: i64,
    /// Whether the image knows the mapper.
    told: bool,
    /// Where first touches are recorded.
    touches: Option<Arc<Recorder>>,
    mapper: Arc<Afar>,
}

/// The other end, as one that maps an image.
struct Afar {
    link: Weak<PageLink>,
    image: ImageName,
}

/// A request on its way: answered when the last of its runs is there, or the first one is lost.
struct Wanted {
    link: Arc<PageLink>,
    request: u64,
    image: Arc<MemoryImage>,
    ranges: Vec<Range<u64>>,
    /// Runs that are not there yet, and one more while they are being asked for.
    left: AtomicUsize,
    failed: OnceLock<SourceError>,
    asked_again: AtomicBool,
}

/// One run of a request.
struct Run(Arc<Wanted>);

impl PageLink {
    /// The other end may ask for pages of `image` from now on.
    pub(crate) fn offer(
        self: &Arc<Self>,
        image: &Arc<MemoryImage>,
        touches: Option<Arc<Recorder>>,
    ) {
        let mut offers = lock(&self.offers);
        offers.retain(|_, offer| offer.image.strong_count() > 0);
        let name = image.name();
        let offer = offers.entry(name).or_insert_with(|| Offer {
            image: Arc::downgrade(image),
            held: None,
            watchers: 0,
            told: false,
            touches: None,
            mapper: Arc::new(Afar {
                link: Arc::downgrade(self),
                image: name,
            }),
        });
        // Of the fork point that came last: its clones are the next to start.
        offer.touches = touches.or(offer.touches.take());
    }

    fn find(&self, image: ImageName) -> Option<(Arc<MemoryImage>, Option<Arc<Recorder>>)> {
        let offers = lock(&self.offers);
        let offer = offers.get(&image)?;
        Some((offer.image.upgrade()?, offer.touches.clone()))
    }

    pub(super) fn watch(&self, name: ImageName) {
        let watched = {
            let mut offers = lock(&self.offers);
            offers.get_mut(&name).and_then(|offer| {
                let image = offer.image.upgrade()?;
                offer.watchers += 1;
                offer.held = (offer.watchers > 0).then(|| image.clone());
                let first = !mem::replace(&mut offer.told, true);
                Some((image, first.then(|| Arc::downgrade(&offer.mapper))))
            })
        };
        let Some((image, mapper)) = watched else {
            let (image, why) = (name, unknown());
            self.say(&PageMessage::Lost { image, why });
            return;
        };
        if let Some(mapper) = mapper {
            image.map_by(mapper);
        }
        // What was so before is not told again.
        if let Some(why) = image.spoiled() {
            let (image, why) = (name, why.clone());
            self.say(&PageMessage::Lost { image, why });
        } else if image.is_whole() {
            self.say(&PageMessage::Whole { image: name });
        }
    }

    pub(super) fn leave(&self, name: ImageName) {
        let held = {
            let mut offers = lock(&self.offers);
            offers.get_mut(&name).and_then(|offer| {
                offer.watchers -= 1;
                match offer.watchers > 0 {
                    true => None,
                    false => offer.held.take(),
                }
            })
        };
        // Not under the lock: much may go with it.
        drop(held);
    }

    pub(super) fn forget_offers(&self) {
        let offers = mem::take(&mut *lock(&self.offers));
        drop(offers);
    }

    pub(super) fn want(self: &Arc<Self>, request: u64, image: ImageName, ranges: Vec<Range<u64>>) {
        let outcome = match self.find(image) {
            None => Err(unknown()),
            Some((image, _)) if !ranges.iter().all(|range| are_pages(range, image.len())) => {
                Err(SourceError::Gone {
                    name: self.peer.clone(),
                    why: "it asked for what are no pages of this memory".into(),
                })
            }
            Some((image, touches)) => {
                if let Some(touches) = touches {
                    ranges.iter().for_each(|range| touches.touched(range));
                }
                match self.bring(request, &image, &ranges) {
                    Ok(()) => return,
                    failed => failed,
                }
            }
        };
        self.say(&PageMessage::Came { request, outcome });
    }
}

impl PageLink {
    /// Brings pages, and answers when they are there. An error when that made this thread panic, as often as
    /// a fault thread may die of a VM's faults: a source can be the embedder's code.
    fn bring(
        self: &Arc<Self>,
        request: u64,
        image: &Arc<MemoryImage>,
        ranges: &[Range<u64>],
    ) -> Result<(), SourceError> {
        for _ in 0..MOST_HANDLER_DEATHS {
            let wanted = Arc::new(Wanted {
                link: self.clone(),
                request,
                image: image.clone(),
                ranges: ranges.to_vec(),
                left: AtomicUsize::new(0),
                failed: OnceLock::new(),
                asked_again: AtomicBool::new(false),
            });
            // One that was left half-way answers nothing.
            if catch_unwind(AssertUnwindSafe(|| wanted.ask())).is_ok() {
                return Ok(());
            }
            tracing::error!(peer = self.peer, "bringing pages panicked");
        }
        Err(SourceError::Damaged {
            name: "the image".into(),
            offset: ranges.first().map_or(0, |range| range.start),
            why: format!("the fault handler died of its faults {MOST_HANDLER_DEATHS} times"),
        })
    }
}

fn unknown() -> SourceError {
    SourceError::Gone {
        name: "the image".into(),
        why: "it is not there any more".into(),
    }
}

impl Wanted {
    /// Asks for all that is not there.
    fn ask(self: &Arc<Self>) {
        self.left.store(1, Ordering::Release);
        for range in &self.ranges {
            self.image.provide_all(range, || {
                self.left.fetch_add(1, Ordering::AcqRel);
                Arc::new(Run(self.clone()))
            });
        }
        self.one_less();
    }

    fn one_less(self: &Arc<Self>) {
        if self.left.fetch_sub(1, Ordering::AcqRel) > 1 {
            return;
        }
        let lacking = self.ranges.iter().find(|range| self.image.lacks(range));
        let failed = match (self.failed.get(), lacking) {
            (Some(why), _) => Some(why.clone()),
            (None, None) => None,
            (None, Some(_)) if !self.asked_again.swap(true, Ordering::AcqRel) => {
                // Pages of an earlier image have come there and are taken over from it now.
                return self.ask();
            }
            (None, Some(range)) => Some(SourceError::Damaged {
                name: "the image".into(),
                offset: range.start,
                why: "a page was brought and is not there".into(),
            }),
        };
        let (request, outcome) = (self.request, failed.map_or(Ok(()), Err));
        self.link.say(&PageMessage::Came { request, outcome });
    }
}

impl Waiter for Run {
    fn arrived(&self, _range: &Range<u64>) {
        self.0.one_less();
    }

    fn lost(&self, why: &SourceError) {
        self.0.failed.get_or_init(|| why.clone());
        self.0.one_less();
    }
}

impl Mapper for Afar {
    fn whole(&self) {
        if let Some(link) = self.link.upgrade() {
            link.say(&PageMessage::Whole { image: self.image });
        }
    }

    fn lost(&self, why: &SourceError) {
        if let Some(link) = self.link.upgrade() {
            let (image, why) = (self.image, why.clone());
            link.say(&PageMessage::Lost { image, why });
        }
    }
}
