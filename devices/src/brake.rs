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
//! A thread that is no vCPU's has no gate that a pause could wait at. So it announces each stretch in
//! which it may touch guest memory ([`Brake::try_work`]), and who has pulled the brake waits until
//! none is under way ([`Brake::until_still`]).
//!
//! Who makes devices gives all of them of one machine the same brake.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use thiserror::Error;

/// A flag that all devices of a machine look at between two requests. Clones are the same brake.
#[derive(Clone, Debug, Default)]
pub struct Brake(Arc<Flags>);

#[derive(Debug, Default)]
struct Flags {
    pulled: AtomicBool,
    condemned: AtomicBool,
    left_over: AtomicBool,
    /// Stretches of [`Work`] that are under way.
    at_work: Mutex<u32>,
    /// Signalled when there is none any more.
    still: Condvar,
}

/// A stretch of work of a thread that is no vCPU's: until it is dropped, the machine does not stand
/// still.
#[derive(Debug)]
pub struct Work(Brake);

/// A thread that is no vCPU's is still at work in a device.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error(
    "a device's own thread did not stop within {deadline:?}: it waits for a page of guest memory"
)]
pub struct NotStill {
    /// How long was waited.
    pub deadline: Duration,
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
    /// Begins a stretch of work on guest memory, on a thread that is no vCPU's; `None` while the brake
    /// is pulled. Never waits.
    pub fn try_work(&self) -> Option<Work> {
        let mut at_work = self.at_work();
        // Under the lock: who pulled the brake before this look finds the stretch counted, or not
        // begun.
        if self.pulled() {
            return None;
        }
        *at_work += 1;
        Some(Work(self.clone()))
    }

    /// Waits, for `deadline` at most, until no stretch of work is under way. The caller has pulled the
    /// brake, so none begins meanwhile.
    pub fn until_still(&self, deadline: Duration) -> Result<(), NotStill> {
        let until = Instant::now() + deadline;
        let mut at_work = self.at_work();
        while *at_work > 0 {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(NotStill { deadline });
            }
            let waited = self.0.still.wait_timeout(at_work, left);
            at_work = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    fn at_work(&self) -> MutexGuard<'_, u32> {
        // No code that can panic runs under this lock.
        self.0
            .at_work
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        let mut at_work = self.0.at_work();
        *at_work -= 1;
        if *at_work == 0 {
            self.0.0.still.notify_all();
        }
    }
}
