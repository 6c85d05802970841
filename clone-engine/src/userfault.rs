//! One userfaultfd, and the errno rules of putting pages into what it watches.
//!
//! A [`Userfault`] watches address ranges of this process. [`Userfault::copy`] and
//! [`Userfault::zero`] are the only places where the engine installs a page. What an error means
//! is decided by [`verdict`] alone. Opened for kernel mode, since KVM touches guest memory there.
#![allow(unsafe_code)] // UFFDIO_COPY and UFFDIO_ZEROPAGE take addresses; fcntl is a C function; raw descriptors.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use forkvm_vmm::memory::PAGE;
use thiserror::Error;
use userfaultfd::{
    Error, Event, FaultKind, FeatureFlags, IoctlFlags, RegisterMode, Uffd, UffdBuilder,
};

/// UFFD_FEATURE_WP_HUGETLBFS_SHMEM (5.19): write protection of memory that is a file.
const WP_SHMEM: u64 = 1 << 12;

/// What a process may map, from the lowest address that the kernel lets be watched (vm.mmap_min_addr is
/// 64 KiB at most) to the end of what it hands out by itself.
const ALL_ADDRESSES: Range<u64> = 1 << 16..(1 << 47) - PAGE;

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Userfault {
    uffd: Uffd,
}

/// What a range is watched for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Watch {
    /// Pages that are not there.
    Missing,
    /// Writes to protected pages.
    Written,
    /// Both.
    MissingAndWritten,
}

/// A fault that waits for an answer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fault {
    /// Host address of the page.
    pub(crate) address: u64,
    /// A write to a protected page, rather than an access to a missing one.
    pub(crate) written: bool,
}

impl Fault {
    /// The page, as a range of addresses.
    pub(crate) fn page(&self) -> Range<u64> {
        self.address..self.address + PAGE
    }
}

/// What an error says of a call on a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// Part of it was done, or the mappings are just changing: go on where it stopped.
    Again,
    /// Somebody was first: drop yours, and wake whoever waits.
    Exists,
    /// Nobody needs it: the range is not watched any more.
    Unwatched,
    /// Nobody needs it: its process is gone, with all that was watched.
    Orphaned,
    /// Nobody could ever watch such a range.
    NoRange,
    /// The host failed.
    Failed,
}

/// The one place where the engine knows what errors of a userfaultfd mean.
fn verdict(errno: Option<i32>) -> Verdict {
    match errno {
        Some(libc::EAGAIN) => Verdict::Again,
        Some(libc::EEXIST) => Verdict::Exists,
        Some(libc::ENOENT) => Verdict::Unwatched,
        Some(libc::ESRCH) => Verdict::Orphaned,
        Some(libc::EINVAL) => Verdict::NoRange,
        _ => Verdict::Failed,
    }
}

/// Whether this process can have what lazy memory and the freezes write-protect and delta need.
///
/// # Errors
/// [`UserfaultError::Unavailable`], with what the kernel said.
pub fn check_userfaultfd() -> Result<(), UserfaultError> {
    Userfault::open().map(drop)
}

impl Userfault {
    /// A userfaultfd that blocks its reader, for faults of user and kernel mode.
    pub(crate) fn open() -> Result<Userfault, UserfaultError> {
        let needed = FeatureFlags::MISSING_SHMEM
            | FeatureFlags::PAGEFAULT_FLAG_WP
            | FeatureFlags::from_bits_retain(WP_SHMEM);
        let mut builder = UffdBuilder::new();
        builder
            .close_on_exec(true)
            .non_blocking(false)
            .user_mode_only(false)
            .require_features(needed)
            .require_ioctls(IoctlFlags::REGISTER | IoctlFlags::UNREGISTER);
        match builder.create() {
            Ok(uffd) => Ok(Userfault { uffd }),
            Err(error) => Err(UserfaultError::Unavailable(into_io(error))),
        }
    }

    /// One of another process, whose memory it watches.
    pub(crate) fn of_other(fd: OwnedFd) -> Userfault {
        // SAFETY: the descriptor is owned and given away here. What it is, only calls on it can tell: on
        // anything but a userfaultfd they are errors.
        let uffd = unsafe { Uffd::from_raw_fd(fd.into_raw_fd()) };
        Userfault { uffd }
    }

    /// A copy of its descriptor, to be given to another process.
    pub(crate) fn duplicate(&self) -> Result<OwnedFd, UserfaultError> {
        // SAFETY: the descriptor is open for as long as `self` is borrowed.
        let fd = unsafe { BorrowedFd::borrow_raw(self.uffd.as_raw_fd()) };
        fd.try_clone_to_owned()
            .map_err(|source| UserfaultError::Call {
                call: "duplicating a userfaultfd",
                source,
            })
    }

    /// Watches `range` of host addresses from now on; what was watched for before stays.
    pub(crate) fn register(&self, range: &Range<u64>, watch: Watch) -> Result<(), UserfaultError> {
        let mode = match watch {
            Watch::Missing => RegisterMode::MISSING,
            Watch::Written => RegisterMode::WRITE_PROTECT,
            Watch::MissingAndWritten => RegisterMode::MISSING | RegisterMode::WRITE_PROTECT,
        };
        self.uffd
            .register_with_mode(range.start as *mut _, len(range), mode)
            .map(|_ioctls| ())
            .map_err(failed("UFFDIO_REGISTER"))
    }

    /// Watches `range` no more. Whoever waits in it goes on; what was protected is not any more.
    pub(crate) fn unregister(&self, range: &Range<u64>) -> Result<(), UserfaultError> {
        self.uffd
            .unregister(range.start as *mut _, len(range))
            .map_err(failed("UFFDIO_UNREGISTER"))?;
        // The kernel wakes those that miss a page, not those that wait to write.
        self.wake(range)
    }

    /// Has whoever waits in `range` try again.
    pub(crate) fn wake(&self, range: &Range<u64>) -> Result<(), UserfaultError> {
        self.uffd
            .wake(range.start as *mut _, len(range))
            .map_err(failed("UFFDIO_WAKE"))
    }

    /// Has writes to `range` wait from now on.
    pub(crate) fn protect(&self, range: &Range<u64>) -> Result<(), UserfaultError> {
        loop {
            match self.uffd.write_protect(range.start as *mut _, len(range)) {
                Ok(()) => return Ok(()),
                Err(error) => match verdict(errno(&error)) {
                    Verdict::Again => {}
                    // Also when it is not watched: somebody counts on it.
                    _ => return Err(failed("UFFDIO_WRITEPROTECT")(error)),
                },
            }
        }
    }

    /// Has whoever waits anywhere in that process try again.
    pub(crate) fn wake_all(&self) -> Result<(), UserfaultError> {
        self.wake(&ALL_ADDRESSES)
    }

    /// Whether the memory that it watches is gone with its process, and whoever acted on it.
    pub(crate) fn is_orphan(&self) -> Result<bool, UserfaultError> {
        let start = ALL_ADDRESSES.start as *mut _;
        // SAFETY: nothing is ever watched at the lowest address of all, so no page is mapped there.
        match unsafe { self.uffd.zeropage(start, PAGE as usize, false) } {
            Err(error) => match verdict(errno(&error)) {
                Verdict::Orphaned => Ok(true),
                Verdict::Unwatched | Verdict::NoRange | Verdict::Again => Ok(false),
                Verdict::Exists | Verdict::Failed => Err(failed("UFFDIO_ZEROPAGE")(error)),
            },
            Ok(_) => Ok(false),
        }
    }

    /// Lets writes to `range` through, those that wait included. Done when the range is gone.
    pub(crate) fn unprotect(&self, range: &Range<u64>) -> Result<(), UserfaultError> {
        let start = range.start as *mut _;
        loop {
            match self.uffd.remove_write_protection(start, len(range), true) {
                Ok(()) => return Ok(()),
                Err(error) => match verdict(errno(&error)) {
                    Verdict::Again => {}
                    // Not watched any more, so not protected; but somebody waits.
                    Verdict::Unwatched | Verdict::Orphaned => return self.wake(range),
                    _ => return Err(failed("UFFDIO_WRITEPROTECT")(error)),
                },
            }
        }
    }

    /// Copies the bytes at `from` to the watched range at `to`, page by page, where no page is yet.
    /// `installed` hears of each piece that was not there, as offsets from `to`. Wakes who waits at
    /// the pages installed, and no one else.
    ///
    /// # Safety
    /// `from..from + len` must be readable, or stay unmapped by design: the kernel reads it, and an
    /// address without memory is an error. What is read may change meanwhile.
    pub(crate) unsafe fn copy(
        &self,
        from: *const u8,
        to: u64,
        len: u64,
        mut installed: impl FnMut(Range<u64>),
    ) -> Result<(), UserfaultError> {
        let mut done = 0;
        while done < len {
            // SAFETY: the caller's promise for the source. The destination is only ever a range
            // that this userfaultfd watches, where the kernel installs a page if there is none.
            let copied = unsafe {
                self.uffd.copy(
                    from.wrapping_add(done as usize).cast(),
                    (to + done) as *mut _,
                    (len - done) as usize,
                    true,
                )
            };
            let step = match copied {
                Ok(bytes) => bytes as u64,
                // The length is nonsense when nothing was copied.
                Err(Error::PartiallyCopied(bytes)) if bytes as u64 <= len - done => bytes as u64,
                Err(error) => match verdict(errno(&error)) {
                    Verdict::Again => 0,
                    Verdict::Exists => {
                        done += PAGE;
                        continue;
                    }
                    Verdict::Unwatched | Verdict::Orphaned => return Ok(()),
                    Verdict::NoRange | Verdict::Failed => {
                        return Err(failed("UFFDIO_COPY")(error));
                    }
                },
            };
            if step > 0 {
                installed(done..done + step);
                done += step;
            }
        }
        Ok(())
    }

    /// Maps the zero page at the start of the watched `range`, and on as far as no page is yet. Wakes
    /// who waits there. Whether there was no page at the start.
    pub(crate) fn zero(&self, range: &Range<u64>) -> Result<bool, UserfaultError> {
        // SAFETY: the range is one that this userfaultfd watches; the kernel maps a page only where
        // there is none.
        let zeroed = unsafe { self.uffd.zeropage(range.start as *mut _, len(range), true) };
        match zeroed {
            Ok(_) => Ok(true),
            Err(error) => match verdict(errno(&error)) {
                // Part of it: at least the first page.
                Verdict::Again => Ok(true),
                Verdict::Exists | Verdict::Unwatched | Verdict::Orphaned => {
                    self.wake(&(range.start..range.start + PAGE))?;
                    Ok(false)
                }
                Verdict::NoRange | Verdict::Failed => Err(failed("UFFDIO_ZEROPAGE")(error)),
            },
        }
    }

    /// Whether [`next_fault`](Self::next_fault) waits.
    pub(crate) fn set_blocking(&self, blocking: bool) -> Result<(), UserfaultError> {
        let flags = if blocking { 0 } else { libc::O_NONBLOCK };
        // SAFETY: sets the flags of a descriptor that `self` owns; no memory is involved.
        match unsafe { libc::fcntl(self.uffd.as_raw_fd(), libc::F_SETFL, flags) } {
            -1 => Err(UserfaultError::Call {
                call: "F_SETFL of a userfaultfd",
                source: io::Error::last_os_error(),
            }),
            _ => Ok(()),
        }
    }

    /// Waits for a fault. `None` when a signal came first, or there is none and it does not wait.
    pub(crate) fn next_fault(&self) -> Result<Option<Fault>, UserfaultError> {
        match self.uffd.read_event() {
            Ok(Some(Event::Pagefault { kind, addr, .. })) => Ok(Some(Fault {
                address: addr as u64 & !(PAGE - 1),
                written: kind == FaultKind::WriteProtected,
            })),
            // No other event was asked for.
            Ok(_) => Ok(None),
            Err(error) if errno(&error) == Some(libc::EINTR) => Ok(None),
            Err(error) => Err(failed("reading a fault")(error)),
        }
    }
}

fn len(range: &Range<u64>) -> usize {
    (range.end - range.start) as usize
}

fn errno(error: &Error) -> Option<i32> {
    match error {
        Error::CopyFailed(errno) | Error::ZeropageFailed(errno) | Error::SystemError(errno) => {
            Some(*errno as i32)
        }
        Error::PartiallyCopied(_) => Some(libc::EAGAIN),
        _ => None,
    }
}

fn into_io(error: Error) -> io::Error {
    match (errno(&error), error) {
        (Some(errno), _) => io::Error::from_raw_os_error(errno),
        (None, Error::OpenDevUserfaultfd(error)) => error,
        (None, error) => io::Error::other(error.to_string()),
    }
}

fn failed(call: &'static str) -> impl Fn(Error) -> UserfaultError {
    move |error| UserfaultError::Call {
        call,
        source: into_io(error),
    }
}

/// Why faults cannot be served.
#[derive(Debug, Error)]
pub enum UserfaultError {
    /// No userfaultfd for kernel mode.
    #[error(
        "no userfaultfd for kernel mode, which lazy memory and the freezes write-protect and delta \
         need; `forkvm doctor` says what to do, and freezes remap and copy do without"
    )]
    Unavailable(#[source] io::Error),
    /// A call on a userfaultfd failed.
    #[error("{call} failed")]
    Call {
        /// The call.
        call: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_means_one_thing_wherever_it_comes_from() {
        let means = |errno: i32| verdict(Some(errno));
        assert_eq!(means(libc::EEXIST), Verdict::Exists);
        assert_eq!(means(libc::EAGAIN), Verdict::Again);
        assert_eq!(means(libc::ENOENT), Verdict::Unwatched);
        assert_eq!(means(libc::ESRCH), Verdict::Orphaned);
        assert_eq!(means(libc::EINVAL), Verdict::NoRange);
        assert_eq!(means(libc::ENOMEM), Verdict::Failed);
        assert_eq!(means(libc::EFAULT), Verdict::Failed);
        assert_eq!(verdict(None), Verdict::Failed);
    }

    #[test]
    fn a_userfaultfd_of_a_living_process_is_no_orphan() {
        let Ok(userfault) = Userfault::open() else {
            println!("skipped: no userfaultfd");
            return;
        };
        assert!(!userfault.is_orphan().unwrap());
    }

    #[test]
    fn to_protect_what_is_not_watched_is_an_error_and_to_unprotect_it_is_none() {
        let Ok(userfault) = Userfault::open() else {
            println!("skipped: no userfaultfd");
            return;
        };
        let file = forkvm_vmm::memory::memfd(c"test", PAGE).unwrap();
        let window = forkvm_vmm::memory::Window::new(&file, PAGE).unwrap();
        let range = window.address()..window.address() + PAGE;
        assert!(userfault.protect(&range).is_err());
        userfault.unprotect(&range).unwrap();
    }
}
