//! Getting a thread out of a system call: a vCPU's out of KVM_RUN, any other out of a read.
//!
//! A signal alone is not enough: it may come just before KVM_RUN is entered and be lost. So the
//! handler, which runs in the vCPU's own thread, sets `immediate_exit` in that thread's `kvm_run`:
//! from when the thread is `Kickable` on, the running or the next KVM_RUN returns with EINTR (KVM
//! API, section 5, `immediate_exit`).
#![allow(unsafe_code)] // Signal handler, pthread_kill, and a pointer into the mapped kvm_run.

use std::cell::Cell;
use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::ptr;
use std::sync::OnceLock;
use std::thread::JoinHandle;

use libc::{c_int, c_void, pthread_t, siginfo_t};
use vmm_sys_util::signal;

thread_local! {
    /// `kvm_run.immediate_exit` of the vCPU that this thread runs; null in every other thread.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

/// The signal that kicks. A real-time signal, so that no library claims it.
fn number() -> c_int {
    signal::SIGRTMIN()
}

/// Installs the handler, once in the process.
pub fn prepare_signal() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    INSTALLED
        .get_or_init(|| {
            signal::register_signal_handler(number(), handler).map_err(|error| error.errno())
        })
        .map_err(io::Error::from_raw_os_error)
}

/// Lets kicks through to the calling thread, whose mask is that of the thread that made it: a
/// program that waits for its signals in one thread blocks them in all others.
pub fn allow_kicks() {
    if let Err(error) = signal::unblock_signal(number()) {
        tracing::error!(%error, "a thread cannot be kicked");
    }
}

extern "C" fn handler(_signal: c_int, _info: *mut siginfo_t, _context: *mut c_void) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: the pointer is set only while this thread's `Kickable` lives, and that borrows the
        // vCPU whose kvm_run holds the byte. Only this thread and the kernel access it.
        unsafe { flag.write_volatile(1) };
    }
}

/// While it lives, kicks reach the vCPU that this thread runs.
pub(crate) struct Kickable;

impl Kickable {
    /// `flag` points to `immediate_exit` of the thread's vCPU.
    ///
    /// # Safety
    /// The pointer must stay valid until the value is dropped, in the same thread.
    pub(crate) unsafe fn new(flag: *mut u8) -> Kickable {
        IMMEDIATE_EXIT.set(flag);
        Kickable
    }
}

impl Drop for Kickable {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(ptr::null_mut());
    }
}

/// Handle to kick a thread.
#[derive(Clone, Copy, Debug)]
pub struct Kick(pthread_t);

impl Kick {
    /// Of the calling thread.
    pub fn of_this_thread() -> Kick {
        // SAFETY: always succeeds.
        Kick(unsafe { libc::pthread_self() })
    }

    /// Of the thread behind a handle.
    pub fn of<T>(thread: &JoinHandle<T>) -> Kick {
        Kick(thread.as_pthread_t())
    }

    /// Makes the thread's running or next KVM_RUN return, or interrupts (EINTR) the system call that
    /// it is in. The thread must not have been joined.
    pub fn kick(self) {
        // SAFETY: the caller still holds the thread's JoinHandle, so the id is valid.
        let error = unsafe { libc::pthread_kill(self.0, number()) };
        // ESRCH: the thread has ended by itself, so there is nothing to get out of KVM_RUN.
        debug_assert!(error == 0 || error == libc::ESRCH, "pthread_kill: {error}");
    }
}
