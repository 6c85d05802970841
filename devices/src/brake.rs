//! Ends a device's work early when its machine is to stand still, and for good when it is lost.
//!
//! A device serves the guest's requests on the vCPU that announces them, as long as requests come;
//! a guest whose other vCPUs keep them coming would hold that vCPU in the device for ever. So the
//! machine pulls the brake before it waits for its vCPUs (pause, end), and the device stops between
//! two requests. What it leaves stays in its queue, and the brake remembers that there is such work.
//!
//! Guest memory may come page by page, and an access waits for its page. A machine whose page can
//! never come is *condemned*: it will be ended, and only so that its threads get out, what is
//! missing reads as zero from then on. Nothing that was read after that may leave the machine, so a
//! device asks between reading guest memory and acting on it.
//!
//! Who makes devices gives all of them of one machine the same brake.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use thiserror::Error;

/// A flag that all devices of a machine look at between two requests. Clones are the same brake.
#[derive(Clone, Debug, Default)]
pub struct Brake(Arc<Flags>);

#[derive(Debug, Default)]
struct Flags {
    pulled: AtomicBool,
    condemned: AtomicBool,
    left_over: AtomicBool,
}

/// What was read of guest memory may never have been there: the machine is lost, and its devices
/// do nothing any more.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("the machine is condemned: a page of its memory can never come")]
pub struct Condemned;

impl Brake {
    /// Has the devices stop at the next request that they would begin.
    pub fn pull(&self) {
        self.0.pulled.store(true, Ordering::SeqCst);
    }

    /// Lets the devices work again. What they left is not taken up by that:
    /// [`take_left_over`](Brake::take_left_over). A condemned machine's devices stay stopped.
    pub fn release(&self) {
        self.0.pulled.store(false, Ordering::SeqCst);
    }

    /// Whether the devices are to stop.
    pub fn pulled(&self) -> bool {
        self.0.pulled.load(Ordering::SeqCst) || self.condemned()
    }

    /// Gives the machine up, for good: its devices neither change a disk nor raise an interrupt any
    /// more, from anything that they read after this call. Never blocks, and takes no lock.
    ///
    /// Comes before the first missing page is answered with zeros: an access that such an answer
    /// lets go on then finds the machine condemned.
    pub fn condemn(&self) {
        self.0.condemned.store(true, Ordering::SeqCst);
    }

    /// Whether the machine was given up.
    pub fn condemned(&self) -> bool {
        self.0.condemned.load(Ordering::SeqCst)
    }

    /// Vouches for what was read of guest memory so far. A device asks after it has read, and
    /// before it acts on that.
    pub fn vouch(&self) -> Result<(), Condemned> {
        if self.condemned() {
            Err(Condemned)
        } else {
            Ok(())
        }
    }

    /// Whether a device has left requests in a queue since the last `true`. Who gets `true` calls
    /// [`Device::activate`](crate::Device::activate) of every device, best from a vCPU's thread:
    /// the guest can prolong that as well. Always `false` while the brake is pulled.
    pub fn take_left_over(&self) -> bool {
        !self.pulled()
            && self.0.left_over.load(Ordering::SeqCst)
            && self.0.left_over.swap(false, Ordering::SeqCst)
    }

    /// Notes that requests may be left behind: by a device that stops, or in the queues of a machine
    /// that was restored. Says whether it still is to stop: somebody
    /// who released the brake meanwhile may have looked too early.
    pub fn leave_over(&self) -> bool {
        self.0.left_over.store(true, Ordering::SeqCst);
        self.pulled()
    }
}
