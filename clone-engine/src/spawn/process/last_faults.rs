//! Answers the page faults that a dead worker leaves behind.
//!
//! KVM fetches a page that is missing by a thread of the kernel's, which no signal ends. If nobody held
//! the worker's userfaultfds when it dies, that thread would go on without them, and put a zero page into
//! the image that all siblings map. So the engine holds copies of them, and answers what comes with
//! zero pages in the dead worker's own mapping, until its memory is gone.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crate::userfault::{Userfault, UserfaultError};

/// How often is looked whether somebody waits. Who is woken asks again a moment later.
const LOOK: Duration = Duration::from_millis(1);

/// Answers what comes through a dead worker's userfaultfds, in a thread that ends with the worker's memory:
/// the process may be gone before that.
pub(super) fn answer(pid: u32, userfaults: Vec<OwnedFd>) {
    if userfaults.is_empty() {
        return;
    }
    let userfaults: Arc<[Userfault]> = userfaults.into_iter().map(Userfault::of_other).collect();
    let answering = userfaults.clone();
    let answer = move || {
        // Each is looked at each time.
        while answering
            .iter()
            .filter(|userfault| !has_ended(pid, userfault))
            .count()
            > 0
        {
            thread::sleep(LOOK);
        }
        tracing::debug!(pid, "the memory of a dead worker is gone");
    };
    let thread = thread::Builder::new().name(format!("faults-{pid}"));
    if let Err(error) = thread.spawn(answer) {
        tracing::error!(%error, pid, "no thread to answer the last faults of a worker");
        // Never closed: what still waits had better wait for ever.
        std::mem::forget(userfaults);
    }
}

fn has_ended(pid: u32, userfault: &Userfault) -> bool {
    answer_all(userfault).unwrap_or_else(|error| {
        tracing::error!(%error, pid, "the faults of a dead worker are not answered");
        false
    })
}

/// Answers what waits now. Whether there can be no more.
fn answer_all(userfault: &Userfault) -> Result<bool, UserfaultError> {
    userfault.set_blocking(false)?;
    while let Some(fault) = userfault.next_fault()? {
        let page = fault.page();
        match fault.written {
            true => userfault.unprotect(&page)?,
            false => {
                userfault.zero(&page)?;
            }
        }
    }
    // What the worker had read and not answered is not told twice, but whoever is woken asks again.
    userfault.wake_all()?;
    userfault.is_orphan()
}
