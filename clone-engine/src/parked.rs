//! A thread that is there before its work is: made ahead, it takes up what it is given at once.
//!
//! Used for the threads that serve VMs: with the VM's shell they wait in the pool.
#![allow(unsafe_code)] // The name of a thread that runs already: pthread_setname_np.

use std::ffi::CString;
use std::io;
use std::sync::mpsc::{Sender, channel};
use std::thread::{self, JoinHandle};

/// Bytes of a thread's name that the kernel keeps (TASK_COMM_LEN, less the NUL).
const NAME_LEN: usize = 15;

type Work = Box<dyn FnOnce() + Send>;

/// See the module's text. Dropped without work, it ends.
#[derive(Debug)]
pub(crate) struct Parked {
    work: Option<Sender<(String, Work)>>,
    thread: Option<JoinHandle<()>>,
}

impl Parked {
    pub(crate) fn new() -> io::Result<Parked> {
        let (work, given) = channel::<(String, Work)>();
        let wait = move || {
            if let Ok((name, work)) = given.recv() {
                name_this_thread(&name);
                work();
            }
        };
        let thread = thread::Builder::new().name("parked".into()).spawn(wait)?;
        Ok(Parked {
            work: Some(work),
            thread: Some(thread),
        })
    }

    /// Has the thread do `work` under this name.
    pub(crate) fn begin(
        mut self,
        name: &str,
        work: impl FnOnce() + Send + 'static,
    ) -> JoinHandle<()> {
        let (Some(parked), Some(thread)) = (self.work.take(), self.thread.take()) else {
            unreachable!("both are there until the work or the drop");
        };
        let given = parked.send((name.to_owned(), Box::new(work)));
        debug_assert!(
            given.is_ok(),
            "the thread waits as long as it can be sent something"
        );
        thread
    }
}

impl Drop for Parked {
    fn drop(&mut self) {
        self.work = None;
        if let Some(Err(_panic)) = self.thread.take().map(JoinHandle::join) {
            tracing::error!("a parked thread panicked");
        }
    }
}

fn name_this_thread(name: &str) {
    let Ok(name) = CString::new(&name.as_bytes()[..name.len().min(NAME_LEN)]) else {
        return;
    };
    // SAFETY: the name is a C string that outlives the call; the thread is the calling one.
    let error = unsafe { libc::pthread_setname_np(libc::pthread_self(), name.as_ptr()) };
    if error != 0 {
        tracing::debug!(error, "a thread keeps its name");
    }
}
