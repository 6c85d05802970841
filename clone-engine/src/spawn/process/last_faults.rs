//! Answers the page faults that a dead worker leaves behind.
//!
//! KVM fetches a page that is missing by a thread of the kernel's, which no signal ends. If nobody held
//! the worker's userfaultfds when it dies, that thread would go on without them, and put a zero page into
//! the image that all siblings map. So the engine holds copies of them, and answers what comes with
//! zero pages in the dead worker's own mapping, until its memory is gone.

use std::os::fd::OwnedFd;

use crate::userfault::{Userfault, UserfaultError};

/// See the module's text.
#[derive(Default)]
pub(super) struct LastFaults {
    userfaults: Vec<Userfault>,
}

impl LastFaults {
    /// Through the worker's userfaultfds. They do not wait any more: nobody else reads them.
    pub(super) fn of(fds: Vec<OwnedFd>) -> LastFaults {
        let open = |fd| {
            let userfault = Userfault::of_other(fd);
            match userfault.set_blocking(false) {
                Ok(()) => Some(userfault),
                Err(error) => {
                    tracing::error!(%error, "the faults of a dead worker cannot be read");
                    None
                }
            }
        };
        LastFaults {
            userfaults: fds.into_iter().filter_map(open).collect(),
        }
    }

    /// Answers what waits now.
    pub(super) fn answer(&mut self) {
        self.userfaults.retain(|userfault| match answer(userfault) {
            Ok(()) => true,
            Err(error) => {
                tracing::debug!(%error, "no fault of a dead worker is answered any more");
                false
            }
        });
    }
}

fn answer(userfault: &Userfault) -> Result<(), UserfaultError> {
    // What the worker had read and not answered is not told twice, but whoever is woken asks again.
    userfault.wake_all()?;
    while let Some(fault) = userfault.next_fault()? {
        let page = fault.page();
        match fault.written {
            true => userfault.unprotect(&page)?,
            false => {
                userfault.zero(&page)?;
            }
        }
    }
    Ok(())
}
