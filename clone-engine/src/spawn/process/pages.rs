//! Brings pages to the clones of one worker, and tells it what becomes of their images.
//!
//! Images are filled here and nowhere else: the worker asks, the page comes into the image's file as for
//! a clone of this process, and the answer says that it is there. What waits for a far source is answered
//! by whoever hears from it; nothing here waits.

use std::collections::HashMap;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;
use std::{io, thread};

use crate::fault::fetcher::Waiter;
use crate::image::{ImageNumber, Mapper, MemoryImage, are_pages};
use crate::member::with_causes;
use crate::source::SourceError;
use crate::wire::pages::{PageCall, PageNews};
use crate::wire::socket::{Received, Socket, SocketError};
use crate::working_set::Recorder;

/// How long a worker may take to make room for one more answer. It reads at once, unless it was stopped.
const PATIENCE: Duration = Duration::from_secs(1);

/// See the module's text.
pub(super) struct Pages {
    pid: u32,
    socket: Socket,
    /// Images that the worker may ask for.
    offered: Mutex<HashMap<ImageNumber, Offered>>,
}

struct Offered {
    image: Weak<MemoryImage>,
    /// Where first touches are recorded.
    touches: Option<Arc<Recorder>>,
    mapper: Arc<Afar>,
}

/// A worker, as one that maps an image.
struct Afar {
    pages: Weak<Pages>,
    image: ImageNumber,
}

/// A request on its way: answered when the last of its runs is there, or the first one is lost.
struct Wanted {
    pages: Arc<Pages>,
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

impl Pages {
    /// For the worker `pid`; also the end of the socket that it is to have.
    pub(super) fn new(pid: u32) -> io::Result<(Arc<Pages>, OwnedFd)> {
        let (socket, far) = Socket::pair()?;
        socket.send_within(Some(PATIENCE))?;
        let pages = Arc::new(Pages {
            pid,
            socket,
            offered: Mutex::default(),
        });
        Ok((pages, far))
    }

    /// Hears the worker from now on, in a thread that ends with the socket. `lost` is called when the
    /// worker cannot be served any more.
    pub(super) fn serve(self: &Arc<Self>, lost: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let pages = self.clone();
        let serve = move || {
            pages.hear();
            pages.close();
            lost();
        };
        let thread = thread::Builder::new().name(format!("pages-{}", self.pid));
        thread.spawn(serve).map(|_detached| ())
    }

    pub(super) fn close(&self) {
        self.socket.close();
    }

    /// The worker may ask for pages of `image` from now on.
    pub(super) fn offer(
        self: &Arc<Self>,
        image: &Arc<MemoryImage>,
        touches: Option<Arc<Recorder>>,
    ) {
        let mut offered = self.offered();
        offered.retain(|_, offered| offered.image.strong_count() > 0);
        let number = image.number();
        let offered = offered.entry(number).or_insert_with(|| Offered {
            image: Arc::downgrade(image),
            touches: None,
            mapper: Arc::new(Afar {
                pages: Arc::downgrade(self),
                image: number,
            }),
        });
        // Of the fork point that came last: its clones are the next to start.
        offered.touches = touches.or(offered.touches.take());
    }

    fn offered(&self) -> MutexGuard<'_, HashMap<ImageNumber, Offered>> {
        self.offered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hear(self: &Arc<Self>) {
        loop {
            let heard: Result<Received<PageCall>, SocketError> = self.socket.receive();
            match heard {
                Ok((PageCall::Watch { image }, _)) => self.watch(image),
                Ok((
                    PageCall::Want {
                        request,
                        image,
                        ranges,
                    },
                    _,
                )) => self.want(request, image, ranges),
                Err(SocketError::Closed) => return,
                Err(error) => {
                    let error = with_causes(&error);
                    tracing::error!(pid = self.pid, error, "a worker asks for what is no page");
                    return;
                }
            }
        }
    }

    fn tell(&self, news: &PageNews) {
        match self.socket.send(news, &[]) {
            Ok(()) => {}
            Err(SocketError::Closed) => tracing::trace!(pid = self.pid, "news of a page came late"),
            Err(error) => {
                let error = with_causes(&error);
                tracing::error!(
                    pid = self.pid,
                    error,
                    "a worker does not hear of its pages, so it is given up"
                );
                self.close();
            }
        }
    }

    fn find(&self, image: ImageNumber) -> Option<(Arc<MemoryImage>, Option<Arc<Recorder>>)> {
        let offered = self.offered();
        let offered = offered.get(&image)?;
        Some((offered.image.upgrade()?, offered.touches.clone()))
    }

    fn watch(&self, number: ImageNumber) {
        let Some((image, _)) = self.find(number) else {
            let (image, why) = (number, unknown());
            return self.tell(&PageNews::Lost { image, why });
        };
        let mapper: Option<Weak<Afar>> = {
            let offered = self.offered();
            let offered = offered.get(&number);
            offered.map(|offered| Arc::downgrade(&offered.mapper))
        };
        if let Some(mapper) = mapper {
            image.map_by(mapper);
        }
        // What was so before is not told again.
        if let Some(why) = image.spoiled() {
            let (image, why) = (number, why.clone());
            self.tell(&PageNews::Lost { image, why });
        } else if image.is_whole() {
            self.tell(&PageNews::Whole { image: number });
        }
    }

    fn want(self: &Arc<Self>, request: u64, image: ImageNumber, ranges: Vec<Range<u64>>) {
        let outcome = match self.find(image) {
            None => Err(unknown()),
            Some((image, _)) if !ranges.iter().all(|range| are_pages(range, image.len())) => {
                Err(SourceError::Gone {
                    name: format!("worker {}", self.pid),
                    why: "it asked for what are no pages of this memory".into(),
                })
            }
            Some((image, touches)) => {
                if let Some(touches) = touches {
                    ranges.iter().for_each(|range| touches.touched(range));
                }
                let wanted = Wanted {
                    pages: self.clone(),
                    request,
                    image,
                    ranges,
                    left: AtomicUsize::new(0),
                    failed: OnceLock::new(),
                    asked_again: AtomicBool::new(false),
                };
                return Arc::new(wanted).ask();
            }
        };
        self.tell(&PageNews::Came { request, outcome });
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
        self.pages.tell(&PageNews::Came { request, outcome });
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
        if let Some(pages) = self.pages.upgrade() {
            pages.tell(&PageNews::Whole { image: self.image });
        }
    }

    fn lost(&self, why: &SourceError) {
        if let Some(pages) = self.pages.upgrade() {
            let (image, why) = (self.image, why.clone());
            pages.tell(&PageNews::Lost { image, why });
        }
    }
}
