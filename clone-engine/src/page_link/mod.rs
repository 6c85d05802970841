//! Pages between the engine and one of its workers, over a socket of their own: who waits for a page
//! must not wait behind a clone that is being prepared.
//!
//! Each end fills images that the other end maps: the engine those of the VMs that live with it, a worker
//! those of clones that it has forked. An image is filled by one process only, by the one function that
//! does it; whoever maps it elsewhere asks ([`taking`]), the page comes into the image's file as for a clone
//! of that process, and the answer says that it is there ([`giving`]). Nothing is copied twice.
//!
//! One thread hears what comes, and waits for no page; it may wait to answer. What is said is short, and an
//! image is asked for a few runs at a time, so that both ends fill each other's socket, and the worker is
//! given up as one that stands still, only with hundreds of images that fill.

mod giving;
mod message;
mod taking;

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use std::{io, thread};

use crate::family::Family;
use crate::image::{Arrivals, Arriving, ImageName, MemoryImage, OutlineError};
use crate::member::with_causes;
use crate::source::SourceError;
use crate::wire::socket::{Received, Socket, SocketError};

use giving::Offer;
use message::PageMessage;
use taking::{Asked, Taken};

/// How long a worker may take to make room for one more message. It reads at once, unless it was stopped.
const PATIENCE: Duration = Duration::from_secs(1);

/// See the module's text.
pub(crate) struct PageLink {
    /// Who is at the other end.
    peer: String,
    socket: Socket,
    /// Images that the other end may ask for.
    offers: Mutex<HashMap<ImageName, Offer>>,
    /// Images that the other end fills.
    taken: Mutex<HashMap<ImageName, Taken>>,
    /// The last number that was given to a request.
    requests: AtomicU64,
    asked: Mutex<HashMap<u64, Asked>>,
}

impl PageLink {
    /// To `peer`; also the end of the socket that it is to have.
    pub(crate) fn pair(peer: String) -> io::Result<(Arc<PageLink>, OwnedFd)> {
        let (socket, far) = Socket::pair()?;
        socket.send_within(Some(PATIENCE))?;
        Ok((PageLink::over(peer, socket), far))
    }

    /// To `peer`, over the end of a socket that came from there.
    pub(crate) fn inherited(peer: String, fd: OwnedFd) -> Result<Arc<PageLink>, SocketError> {
        Ok(PageLink::over(peer, Socket::inherited(fd)?))
    }

    fn over(peer: String, socket: Socket) -> Arc<PageLink> {
        Arc::new(PageLink {
            peer,
            socket,
            offers: Mutex::default(),
            taken: Mutex::default(),
            requests: AtomicU64::new(0),
            asked: Mutex::default(),
        })
    }

    /// Hears the other end from now on, in a thread that ends with the socket. `lost` is called when it
    /// cannot be heard any more.
    pub(crate) fn serve(self: &Arc<Self>, lost: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let link = self.clone();
        let serve = move || {
            // Nobody else hears the other end: whoever waits for it must not do so for ever.
            if catch_unwind(AssertUnwindSafe(|| link.hear())).is_err() {
                tracing::error!(
                    peer = link.peer,
                    "what it said of pages made this process panic"
                );
            }
            link.close();
            link.forget_offers();
            link.give_up_taken();
            lost();
        };
        let thread = thread::Builder::new().name("pages".into());
        thread.spawn(serve).map(|_detached| ())
    }

    pub(crate) fn close(&self) {
        self.socket.close();
    }

    fn hear(self: &Arc<Self>) {
        loop {
            let heard: Result<Received<PageMessage>, SocketError> = self.socket.receive();
            match heard {
                Ok((PageMessage::Watch { image }, _)) => self.watch(image),
                Ok((PageMessage::Leave { image }, _)) => self.leave(image),
                Ok((
                    PageMessage::Want {
                        request,
                        image,
                        ranges,
                    },
                    _,
                )) => self.want(request, image, ranges),
                Ok((PageMessage::Flush { request }, _)) => {
                    let outcome = Ok(());
                    self.say(&PageMessage::Came { request, outcome });
                }
                Ok((PageMessage::Whole { image }, _)) => self.whole(image),
                Ok((PageMessage::Lost { image, why }, _)) => self.lost(image, &why),
                Ok((PageMessage::Came { request, outcome }, _)) => self.came(request, outcome),
                Err(SocketError::Closed) => return,
                Err(error) => {
                    let error = with_causes(&error);
                    tracing::error!(peer = self.peer, error, "what comes is no word of pages");
                    return;
                }
            }
        }
    }

    /// Whether it could be said. A link over which something could not be said is closed: the other end
    /// would wait for it.
    fn say(&self, message: &PageMessage) -> bool {
        match self.socket.send(message, &[]) {
            Ok(()) => true,
            Err(SocketError::Closed) => {
                tracing::trace!(peer = self.peer, "a word of pages came late");
                false
            }
            Err(error) => {
                let error = with_causes(&error);
                tracing::error!(peer = self.peer, error, "the other end hears of no page");
                self.close();
                false
            }
        }
    }

    fn gone(&self) -> SourceError {
        SourceError::Gone {
            name: self.peer.clone(),
            why: "it has ended".into(),
        }
    }
}

/// Where images arrive that a family of this process gets from the other end.
pub(crate) struct Landing<'a> {
    pub(crate) family: &'a Family,
    pub(crate) link: &'a Arc<PageLink>,
}

impl Arrivals for Landing<'_> {
    fn known(&self, name: ImageName) -> Option<Arc<MemoryImage>> {
        self.family.image(name)
    }

    fn arrive(&self, arriving: Arriving) -> Result<Arc<MemoryImage>, OutlineError> {
        self.link.take_over(self.family.faults(), arriving)
    }

    fn made(&self, image: &Arc<MemoryImage>) {
        self.family.keep_account_of(image);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What panics under these locks leaves them as they were: each holds one map.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
