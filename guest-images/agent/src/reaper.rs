//! Children and orphans: one thread waits for all of them.
//!
//! PID 1 inherits every orphan of the machine, and waiting for any child would steal the status that a session waits
//! for. So all of the agent's programs are started through [`spawn`], which enters them in a table before they can be
//! waited for; the status of one that is in the table goes to whoever started it, of another one nowhere. There is
//! one table and one thread in a process: two would steal from each other.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{ChildStderr, ChildStdin, ChildStdout, Command};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use forkvm_agent_protocol::Exit;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::process::{
    Pid, Signal, WaitId, WaitIdOptions, WaitOptions, WaitStatus, kill_process_group,
    test_kill_process_group, wait, waitid,
};

/// How long a process group has between SIGHUP and SIGKILL.
pub(crate) const MERCY: Duration = Duration::from_secs(2);

/// Between two looks at a group, whose end gives no sign.
const PAUSE: Duration = Duration::from_millis(10);

static REAPER: Reaper = Reaper {
    table: Mutex::new(None),
    changed: Condvar::new(),
};

struct Reaper {
    table: Mutex<Option<Table>>,
    changed: Condvar,
}

/// What is known of the children.
#[derive(Default)]
struct Table {
    children: HashMap<i32, Arc<Ended>>,
    /// Counts starts: who found no child waits until it changes.
    started: u64,
    /// The thread has found that there is no child at all.
    childless: bool,
}

/// Starts the thread; once in a process, further calls do nothing.
pub(crate) fn start() -> io::Result<()> {
    let mut table = REAPER.lock();
    if table.is_none() {
        thread::Builder::new()
            .name("reaper".into())
            .spawn(|| REAPER.run())?;
        *table = Some(Table {
            childless: true,
            ..Table::default()
        });
    }
    Ok(())
}

/// Starts `command`, which has to lead a process group of its own.
pub(crate) fn spawn(command: &mut Command) -> io::Result<Spawned> {
    let ended = Arc::new(Ended {
        event: eventfd(0, EventfdFlags::CLOEXEC)?,
        exit: OnceLock::new(),
    });
    // Until it is in the table nobody waits for it. A program that cannot be executed is waited for in here.
    let mut guard = REAPER.lock();
    let table = guard
        .as_mut()
        .ok_or_else(|| io::Error::other("the agent's reaper was not started"))?;
    let child = command.spawn()?;
    let pid = child.id() as i32;
    table.children.insert(pid, ended.clone());
    table.started += 1;
    table.childless = false;
    drop(guard);
    REAPER.changed.notify_all();
    Ok(Spawned {
        child: Child { pid, ended },
        stdin: child.stdin,
        stdout: child.stdout,
        stderr: child.stderr,
    })
}

/// Waits until this process has no children, orphans included. Whether it is so in time.
pub(crate) fn wait_until_childless(limit: Duration) -> bool {
    let guard = REAPER.lock();
    let waited = REAPER.changed.wait_timeout_while(guard, limit, |table| {
        table.as_ref().is_some_and(|table| !table.childless)
    });
    !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
}

impl Reaper {
    fn lock(&self) -> MutexGuard<'_, Option<Table>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        loop {
            let seen = self.lock().as_ref().map_or(0, |table| table.started);
            match waitid(WaitId::All, WaitIdOptions::EXITED | WaitIdOptions::NOWAIT) {
                Err(Errno::CHILD) => self.wait_for_start(seen),
                // It is left a zombie until the table can be looked at.
                _ => self.reap(),
            }
        }
    }

    /// There was no child when `seen` programs had been started.
    fn wait_for_start(&self, seen: u64) {
        let mut guard = self.lock();
        if let Some(table) = guard.as_mut().filter(|table| table.started == seen) {
            table.childless = true;
            self.changed.notify_all();
        }
        let same =
            |table: &mut Option<Table>| table.as_ref().map_or(0, |table| table.started) == seen;
        drop(self.changed.wait_while(guard, same));
    }

    fn reap(&self) {
        let mut guard = self.lock();
        let Some(table) = guard.as_mut() else { return };
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            if let Some(ended) = table.children.remove(&pid.as_raw_pid()) {
                ended.tell(exit_of(status));
            }
        }
    }
}

fn exit_of(status: WaitStatus) -> Exit {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => Exit::Code(code as u8),
        (None, signal) => Exit::Signal(signal.unwrap_or_default() as u8),
    }
}

/// A group that is gone already is what was wanted.
fn kill_group(group: i32, signal: Signal) {
    let sent = Pid::from_raw(group).map(|group| kill_process_group(group, signal));
    if let Some(Err(error)) = sent
        && error != Errno::SRCH
    {
        crate::log::line(&format!(
            "sending signal {} to process group {group}: {error}",
            signal.as_raw()
        ));
    }
}

/// A program that was started, and its pipes.
pub(crate) struct Spawned {
    pub(crate) child: Child,
    pub(crate) stdin: Option<ChildStdin>,
    pub(crate) stdout: Option<ChildStdout>,
    pub(crate) stderr: Option<ChildStderr>,
}

/// A program that leads a process group.
#[derive(Clone)]
pub(crate) struct Child {
    pid: i32,
    ended: Arc<Ended>,
}

impl Child {
    pub(crate) fn pid(&self) -> u32 {
        self.pid as u32
    }

    pub(crate) fn ended(&self) -> &Ended {
        &self.ended
    }

    /// Sends a signal to its group, unless it has ended: its number may be another's then.
    pub(crate) fn signal(&self, signal: Signal) {
        self.signal_all_of(&[signal]);
    }

    /// Whether it had not ended: then its group has the signals, one after the other.
    fn signal_all_of(&self, signals: &[Signal]) -> bool {
        let guard = REAPER.lock();
        let runs = self.is_in(&guard);
        if runs {
            for signal in signals {
                kill_group(self.pid, *signal);
            }
        }
        runs
    }

    /// Whether it is among the children still: its number is its own as long as the table is held.
    fn is_in(&self, table: &Option<Table>) -> bool {
        let entry = table
            .as_ref()
            .and_then(|table| table.children.get(&self.pid));
        entry.is_some_and(|ended| Arc::ptr_eq(ended, &self.ended))
    }

    /// Ends its group: SIGHUP, and SIGKILL for those who are there after [`MERCY`], whether or not their leader is. What it
    /// left behind when it ended by itself is not hung up on.
    pub(crate) fn hang_up(&self) {
        // A stopped process hears SIGHUP only when it goes on.
        if !self.signal_all_of(&[Signal::HUP, Signal::CONT]) {
            return;
        }
        let deadline = Instant::now() + MERCY;
        while self.has_group() {
            if Instant::now() >= deadline {
                return kill_group(self.pid, Signal::KILL);
            }
            thread::sleep(PAUSE);
        }
    }

    /// Whether anybody is left of its group. As long as somebody is, no other process and no other group has the number: who
    /// has looked at every turn knows whom a signal reaches.
    fn has_group(&self) -> bool {
        let guard = REAPER.lock();
        self.is_in(&guard)
            || Pid::from_raw(self.pid).is_some_and(|group| test_kill_process_group(group).is_ok())
    }
}

/// Whether and how a program has ended. Its descriptor becomes readable, and stays so, when it has.
pub(crate) struct Ended {
    event: OwnedFd,
    exit: OnceLock<Exit>,
}

impl Ended {
    fn tell(&self, exit: Exit) {
        // Told once: a program ends once.
        self.exit.get_or_init(|| exit);
        if let Err(error) = rustix::io::write(&self.event, &1u64.to_ne_bytes()) {
            crate::log::line(&format!(
                "telling a session that its program ended: {error}"
            ));
        }
    }

    pub(crate) fn has(&self) -> bool {
        self.exit.get().is_some()
    }

    /// Waits for the end, at most `limit`.
    pub(crate) fn wait(&self, limit: Option<Duration>) -> Option<Exit> {
        let deadline = limit.map(|limit| Instant::now() + limit);
        while !self.has() {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let timeout = left.map(|left| Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: left.subsec_nanos().into(),
            });
            let mut fds = [PollFd::new(&self.event, PollFlags::IN)];
            if let Ok(0) = poll(&mut fds, timeout.as_ref()) {
                break;
            }
        }
        self.exit.get().copied()
    }
}

impl AsFd for Ended {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}
