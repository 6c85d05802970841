//! The thread that owns the doorbell: I/O permissions are a thread's, and one call slot is enough for one.
//!
//! Calls come through a channel and are served one after the other. A fork happens within one: each machine goes
//! on in this thread with its own copy of the answer.

use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use forkvm_abi::doorbell::{Call, MAGIC, PORT, PORT_LEN, VERSION, op, reg, report};
use forkvm_abi::{EXIT_PORT, EXIT_PORT_LEN};
use thiserror::Error;

use super::page::DoorbellPage;
use super::{Doorbell, DoorbellError, Fork, Who, port};

/// The call slot of the thread.
const SLOT: usize = 0;

/// How long a machine that ends may still run, or its thread wait in a join.
const EXIT_LIMIT: Duration = Duration::from_secs(10);

/// A doorbell that answered.
pub struct Hardware {
    page: DoorbellPage,
    jobs: Mutex<Sender<Job>>,
}

/// What the thread is asked to do, and whom it tells.
enum Job {
    Call {
        op: u32,
        arg: u32,
        answer: Sender<io::Result<Call>>,
    },
    Report(u32),
    Exit {
        status: u8,
        returned: Sender<()>,
    },
}

/// Finds the doorbell, gives it a page and a thread.
///
/// # Errors
/// There is none, none of this version, or the kernel does not let this process at it.
pub fn connect() -> Result<Hardware, Missing> {
    let (jobs, waiting) = channel();
    let (started, found) = channel();
    thread::Builder::new()
        .name("doorbell".into())
        .spawn(move || match register() {
            Ok(page) => {
                if started.send(Ok(page)).is_ok() {
                    serve(page, &waiting);
                }
            }
            // Who waits for it is `connect`, which cannot be gone.
            Err(missing) => drop(started.send(Err(missing))),
        })
        .map_err(Missing::Thread)?;
    let page = found.recv().map_err(|_| Missing::Died)??;
    Ok(Hardware {
        page,
        jobs: Mutex::new(jobs),
    })
}

/// Opens the ports to this thread and hands the page over.
fn register() -> Result<DoorbellPage, Missing> {
    port::allow(PORT, PORT_LEN).map_err(Missing::Ports)?;
    port::allow(EXIT_PORT, EXIT_PORT_LEN).map_err(Missing::Ports)?;
    if port::read32(PORT + reg::MAGIC) != MAGIC {
        return Err(Missing::Nobody);
    }
    let version = port::read32(PORT + reg::VERSION);
    if version != VERSION {
        return Err(Missing::Version(version));
    }
    let page = DoorbellPage::map().map_err(Missing::Page)?;
    point_at(page).map_err(Missing::Page)?;
    Ok(page)
}

/// Tells the device where the page is.
fn point_at(page: DoorbellPage) -> io::Result<()> {
    let frame = page.frame()?;
    if port::read32(PORT + reg::PAGE) != frame {
        port::write32(PORT + reg::PAGE, frame);
    }
    match port::read32(PORT + reg::PAGE) {
        taken if taken == frame => Ok(()),
        _ => Err(io::Error::other(format!(
            "the doorbell did not take frame {frame:#x} for its page"
        ))),
    }
}

fn serve(page: DoorbellPage, jobs: &Receiver<Job>) {
    while let Ok(job) = jobs.recv() {
        match job {
            Job::Call { op, arg, answer } => {
                let answered = call(page, op, arg);
                // A session that has gone away no longer wants to know.
                answer.send(answered).unwrap_or_default();
            }
            Job::Report(value) => port::write32(PORT + reg::REPORT, value),
            Job::Exit { status, returned } => {
                port::write32(EXIT_PORT, status.into());
                returned.send(()).unwrap_or_default();
            }
        }
    }
}

/// One call of the host. The vCPU stands until it is answered.
fn call(page: DoorbellPage, op: u32, arg: u32) -> io::Result<Call> {
    // The page may have been moved since.
    point_at(page)?;
    page.write_call(
        SLOT,
        Call {
            op,
            arg,
            result: 0,
            granted: 0,
            ticket: 0,
            pages: 0,
            reserved: [0; 36],
        },
    );
    port::write32(PORT + reg::RING, SLOT as u32);
    let answered = page.read_call(SLOT);
    if op == op::FORK && answered.result > 0 {
        port::write32(PORT + reg::REPORT, report::ACTION);
    }
    Ok(answered)
}

impl Hardware {
    fn ask(&self, job: Job) -> Result<(), DoorbellError> {
        let jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        jobs.send(job)
            .map_err(|_| DoorbellError::Broken("its thread has ended".into()))
    }

    fn call(&self, name: &'static str, op: u32, arg: u32) -> Result<Call, DoorbellError> {
        let (answer, answered) = channel();
        self.ask(Job::Call { op, arg, answer })?;
        let call = answered
            .recv()
            .map_err(|_| DoorbellError::Broken("its thread has ended".into()))?
            .map_err(|error| DoorbellError::Broken(error.to_string()))?;
        match i32::try_from(call.result) {
            Ok(error) if error < 0 => Err(DoorbellError::Refused {
                call: name,
                errno: -error,
            }),
            Ok(_) => Ok(call),
            Err(_) => Err(DoorbellError::Broken(format!(
                "the host answered {}",
                call.result
            ))),
        }
    }
}

impl Doorbell for Hardware {
    fn who(&self) -> Option<Who> {
        Some(Who {
            clone_id: self.page.clone_id(),
            generation: self.page.generation(),
        })
    }

    fn fork(&self, clones: u32) -> Result<Fork, DoorbellError> {
        let call = self.call("fork this machine", op::FORK, clones)?;
        Ok(Fork {
            clone_id: call.result as u32,
            granted: call.granted,
            ticket: call.ticket,
            generation: self.page.generation(),
        })
    }

    fn join(&self, ticket: u32) -> Result<u32, DoorbellError> {
        let call = self.call("wait for the clones", op::JOIN, ticket)?;
        Ok(call.result as u32)
    }

    fn report_ready(&self) {
        if let Err(error) = self.ask(Job::Report(report::READY)) {
            crate::log::line(&error.to_string());
        }
    }

    fn exit(&self, status: u8) {
        let (returned, done) = channel();
        if let Err(error) = self.ask(Job::Exit { status, returned }) {
            return crate::log::line(&error.to_string());
        }
        match done.recv_timeout(EXIT_LIMIT) {
            Err(RecvTimeoutError::Timeout) => {
                crate::log::line("the doorbell is busy: nobody is told how this machine ended");
            }
            _ => crate::log::line("this machine has no exit device"),
        }
    }
}

/// Why there is no doorbell.
#[derive(Debug, Error)]
pub enum Missing {
    /// No thread.
    #[error("starting the thread of the fork doorbell")]
    Thread(#[source] io::Error),
    /// The thread ended while it looked.
    #[error("the thread of the fork doorbell died")]
    Died,
    /// The kernel does not let this process.
    #[error(
        "the kernel does not give the agent the doorbell's I/O ports ({0}): it wants root and CONFIG_X86_IOPL_IOPERM"
    )]
    Ports(io::Error),
    /// The ports read as all ones.
    #[error("nothing answers at its ports")]
    Nobody,
    /// Of another release.
    #[error(
        "it has version {0}, the agent speaks version {VERSION}: use agent and forkvm of one release"
    )]
    Version(u32),
    /// It has no memory to speak through.
    #[error("its page: {0}")]
    Page(io::Error),
}
