//! Asks the engine for pages that clones of this worker miss.
//!
//! The engine fills an image; a worker's own userfaultfd tells that a clone misses a page of it. The
//! question goes out from the image's fetcher ([`crate::fault::fetcher`]), the answer says that the page is in the
//! image's file by now, and the clone is woken to find it there. Whole and lost images are heard of here
//! too.

use std::collections::HashMap;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;

use crate::fault::{FaultConfig, FaultHandler};
use crate::image::{Arriving, ImageNumber, MemoryImage, OutlineError};
use crate::member::with_causes;
use crate::source::{PageSink, PageSource, SourceError};
use crate::wire::pages::{PageCall, PageNews};
use crate::wire::socket::{Received, Socket, SocketError};

/// How much longer than the engine waits for a source a worker waits for the engine: the reason that the
/// engine finds is the better one.
const PATIENCE: u32 = 2;

/// See the module's text.
pub(super) struct Pages {
    socket: Socket,
    /// The last number that was given to a request.
    requests: AtomicU64,
    asked: Mutex<HashMap<u64, Asked>>,
    /// What the engine calls images of this worker; one may have come with several fork points.
    images: Mutex<HashMap<ImageNumber, Vec<Weak<MemoryImage>>>>,
}

/// Hears whether what was asked for came.
type Asked = Sender<Result<(), SourceError>>;

/// The engine, as the source of one image.
struct FilledByEngine {
    pages: Arc<Pages>,
    image: ImageNumber,
}

impl Pages {
    /// Over the worker's end of the socket; a thread hears what comes.
    pub(super) fn start(fd: OwnedFd) -> Result<Arc<Pages>, SocketError> {
        let pages = Arc::new(Pages {
            socket: Socket::inherited(fd)?,
            requests: AtomicU64::new(0),
            asked: Mutex::default(),
            images: Mutex::default(),
        });
        let hearing = pages.clone();
        let hear = thread::Builder::new().name("pages".into());
        hear.spawn(move || hearing.hear())
            .map_err(SocketError::Io)?;
        Ok(pages)
    }

    /// An image that arrives unfinished, to be served by `faults`.
    pub(super) fn take_over(
        self: &Arc<Self>,
        faults: &FaultHandler,
        arriving: Arriving,
    ) -> Result<Arc<MemoryImage>, OutlineError> {
        let there = arriving.there;
        let config = FaultConfig {
            page_deadline: arriving.config.page_deadline * PATIENCE,
            ..arriving.config
        };
        let source = Arc::new(FilledByEngine {
            pages: self.clone(),
            image: there,
        });
        let image = faults.image_elsewhere(Arriving { config, ..arriving }, source);
        let image = image.map_err(OutlineError::Unwatched)?;
        {
            let mut images = self.images();
            images.retain(|_, images| {
                images.retain(|image| image.strong_count() > 0);
                !images.is_empty()
            });
            let known = images.entry(there).or_default();
            known.push(Arc::downgrade(&image));
        }
        // Only now: the answer may come at once. Without an engine there is nothing to know.
        self.say(&PageCall::Watch { image: there });
        Ok(image)
    }

    fn images(&self) -> MutexGuard<'_, HashMap<ImageNumber, Vec<Weak<MemoryImage>>>> {
        self.images.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn asked(&self) -> MutexGuard<'_, HashMap<u64, Asked>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it could be said.
    fn say(&self, call: &PageCall) -> bool {
        let said = self.socket.send(call, &[]);
        if let Err(error) = &said {
            tracing::debug!(error = with_causes(error), "the engine cannot be asked");
            // Then nothing else can be said either: the engine gives this worker up.
            self.socket.close();
        }
        said.is_ok()
    }

    fn hear(&self) {
        loop {
            let heard: Result<Received<PageNews>, SocketError> = self.socket.receive();
            match heard {
                Ok((PageNews::Came { request, outcome }, _)) => {
                    let asked = self.asked().remove(&request);
                    if let Some(Err(_gone)) = asked.map(|asked| asked.send(outcome)) {
                        tracing::trace!(request, "nobody waits for these pages any more");
                    }
                }
                Ok((PageNews::Whole { image }, _)) => {
                    self.each(image, |image| image.whole_elsewhere());
                }
                Ok((PageNews::Lost { image, why }, _)) => {
                    self.each(image, |image| image.spoil(&why));
                }
                Err(error) => {
                    tracing::debug!(error = with_causes(&error), "no page comes any more");
                    self.socket.close();
                    self.asked().clear();
                    return;
                }
            }
        }
    }

    fn each(&self, number: ImageNumber, act: impl Fn(&MemoryImage)) {
        let images = self.images().remove(&number).unwrap_or_default();
        images
            .iter()
            .filter_map(Weak::upgrade)
            .for_each(|image| act(&image));
    }
}

impl PageSource for FilledByEngine {
    fn name(&self) -> String {
        "the engine".into()
    }

    fn fetch(&self, ranges: &[Range<u64>], sink: &mut dyn PageSink) -> Result<(), SourceError> {
        let request = self.pages.requests.fetch_add(1, Ordering::Relaxed);
        let (asked, answer) = channel();
        self.pages.asked().insert(request, asked);
        let said = self.pages.say(&PageCall::Want {
            request,
            image: self.image,
            ranges: ranges.to_vec(),
        });
        if !said {
            self.pages.asked().remove(&request);
        }
        let gone = |_closed| SourceError::Gone {
            name: self.name(),
            why: "it has ended".into(),
        };
        answer.recv().map_err(gone)??;
        ranges
            .iter()
            .try_for_each(|range| sink.there(range.clone()))
    }
}
