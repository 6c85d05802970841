//! One worker, as the engine sees it: its process, its socket, and the thread that hears it.
//!
//! Locks: what is known of a worker ([`State`]) is never locked while something is sent, since the
//! thread that hears the worker takes that lock, and a worker that is not heard may not read either.

use std::cell::OnceCell;
use std::collections::{HashMap, HashSet};
use std::error::Error;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};
use std::{io, mem};

use super::forks::{self, Born, Froze, Parent};
use super::last_faults;
use super::resident::{Request, Resident};
use super::shells::Shells;
use super::{ProcessConfig, SocketError, SpawnError, WorkerError, WorkerProgram};
use crate::accounting::{AccountingError, VmCount};
use crate::descriptor::Description;
use crate::family::Family;
use crate::fork::{ForkError, Ticket};
use crate::fork_point::ForkPoint;
use crate::member::{HoldError, Watch, with_causes};
use crate::page_link::PageLink;
use crate::rewind::RewindError;
use crate::timeline::Timeline;
use crate::wire::socket::{Received, Socket};
use crate::wire::{ForkMade, NotForked, NotRewound, Order, PROTOCOL, Readiness, Told, VERSION};

/// How long a program may take to say that it is a worker; emulated hosts are slow.
const GREETING: Duration = Duration::from_secs(60);

/// How long a worker may owe what it was asked: one that stands still must not hold up those that wait for
/// it. Long enough for a thousand shells on an emulated host.
const ANSWER: Duration = Duration::from_secs(120);

/// How often that is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// Of one that was killed, and not by the engine.
const KILLED: &str = "by somebody, or by the kernel for want of memory, which `dmesg` tells";

/// How long a worker whose socket is closed may take to be gone.
const GOING: Duration = Duration::from_secs(5);

/// A program that was started and has not said yet that it is a worker.
pub(super) struct Started {
    program: WorkerProgram,
    /// Workers that are kept ready, this one among them.
    ready: usize,
    child: OwnChild,
    socket: Socket,
}

/// A child that is ended when this is dropped, whether or not it knows what a socket is.
struct OwnChild {
    pid: u32,
    child: Option<Child>,
}

/// A worker. Dropped, its socket is closed, and it ends.
pub(super) struct Worker {
    link: Arc<Link>,
}

/// A place for one clone in a worker, which stays as long as there is one.
pub(super) struct Berth {
    pub(super) worker: Arc<Worker>,
}

/// What the engine and the thread that hears the worker share.
pub(super) struct Link {
    pid: u32,
    socket: Socket,
    pages: Arc<PageLink>,
    /// What is sent by a thread of its own, for those that must not wait.
    outbox: Sender<Order>,
    /// Places that are taken.
    berths: AtomicUsize,
    /// The last number that was given to a clone or a request.
    numbers: AtomicU64,
    /// Families that it has.
    families: Mutex<HashSet<u64>>,
    /// Workers that are kept ready, this one among them: they share what a family keeps in its pool.
    ready: usize,
    shells: Shells,
    /// Fork points that it has.
    points: Mutex<HashSet<u64>>,
    state: Mutex<State>,
    died: Condvar,
}

#[derive(Default)]
pub(super) struct State {
    /// How it ended.
    pub(super) death: Option<WorkerError>,
    /// Clones that are prepared or run, by their numbers.
    pub(super) residents: HashMap<u64, Resident>,
    /// Who waits for one that is being prepared.
    pub(super) preparing: HashMap<u64, Asked<Readiness>>,
    /// Who waits for shells, by the number of the request.
    pub(super) filling: HashMap<u64, Asked<u32>>,
    /// Clones that are to end.
    pub(super) killed: HashMap<u64, Instant>,
    /// What running ones were asked, with the number of the clone.
    pub(super) requests: HashMap<u64, (u64, Request)>,
    /// Fork points that it has made and speaks of, by their numbers there.
    born: HashMap<u64, Born>,
    /// Why clones of such a fork point do not run, until the host's fork is answered.
    refused: HashMap<u64, ForkError>,
    /// Clones whose fork is being served here: they hear of nothing else meanwhile.
    pub(super) forking: HashSet<u64>,
    /// Copies of its userfaultfds, by the families whose clones they are for.
    userfaults: HashMap<u64, Vec<OwnedFd>>,
}

/// Who waits for an answer, and since when.
pub(super) struct Asked<T> {
    waits: Sender<Result<T, String>>,
    since: Instant,
}

impl<T> Asked<T> {
    pub(super) fn now(waits: Sender<Result<T, String>>) -> Asked<T> {
        let since = Instant::now();
        Asked { waits, since }
    }

    fn answer(self, answer: Result<T, String>) {
        if self.waits.send(answer).is_err() {
            tracing::trace!("nobody waits for what a worker answers");
        }
    }
}

impl State {
    /// What the worker was asked and has owed for too long.
    fn overdue(&self) -> Option<&'static str> {
        let long = |since: &Instant| since.elapsed() > ANSWER;
        if self.preparing.values().any(|asked| long(&asked.since)) {
            Some("it prepares no clone")
        } else if self.filling.values().any(|asked| long(&asked.since)) {
            Some("it builds no shells")
        } else if self
            .killed
            .iter()
            .any(|(clone, since)| long(since) && !self.forking.contains(clone))
        {
            Some("it does not end a clone that was killed")
        } else {
            None
        }
    }
}

/// A family or a fork point that a worker has. Dropped with it, it is forgotten there.
struct HandedOver {
    link: Weak<Link>,
    what: Handed,
}

#[derive(Clone, Copy)]
enum Handed {
    Family(u64),
    Point(u64),
}

impl Worker {
    /// Executes the program.
    pub(super) fn start(config: &ProcessConfig) -> Result<Started, WorkerError> {
        let program = &config.program;
        let failed = |error| program.start_error(&error);
        let (socket, far) = Socket::pair().map_err(failed)?;
        let child = Command::new(&program.path)
            .args(&program.args)
            .stdin(Stdio::from(far))
            .stdout(Stdio::null())
            // What a terminal sends to the engine's group is for the engine to act on.
            .process_group(0)
            .spawn()
            .map_err(failed)?;
        Ok(Started {
            program: program.clone(),
            ready: config.ready,
            child: OwnChild {
                pid: child.id(),
                child: Some(child),
            },
            socket,
        })
    }

    pub(super) fn pid(&self) -> u32 {
        self.link.pid
    }

    pub(super) fn link(&self) -> &Arc<Link> {
        &self.link
    }

    pub(super) fn is_alive(&self) -> bool {
        self.link.state().death.is_none()
    }

    /// Places that are taken.
    pub(super) fn berths(&self) -> usize {
        self.link.berths.load(Ordering::Relaxed)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.link.socket.close();
    }
}

impl Berth {
    pub(super) fn in_worker(worker: &Arc<Worker>) -> Berth {
        worker.link.berths.fetch_add(1, Ordering::Relaxed);
        Berth {
            worker: worker.clone(),
        }
    }
}

impl Drop for Berth {
    fn drop(&mut self) {
        self.worker.link.berths.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Started {
    /// Waits until it says that it is a worker.
    pub(super) fn greet(self) -> Result<Worker, WorkerError> {
        let Started {
            program,
            ready,
            mut child,
            socket,
        } = self;
        let limited = socket.receive_within(Some(GREETING));
        let greeting: Result<Received<Told>, SocketError> = match limited {
            Ok(()) => socket.receive(),
            Err(error) => Err(SocketError::Io(error)),
        };
        let why = match greeting {
            Ok((
                Told::Hello {
                    protocol: PROTOCOL,
                    version,
                    broken: None,
                },
                _,
            )) if version == VERSION => None,
            Ok((
                Told::Hello {
                    broken: Some(why), ..
                },
                _,
            )) => Some(why),
            Ok((
                Told::Hello {
                    version, protocol, ..
                },
                _,
            )) => Some(format!(
                "it has version {version} and protocol {protocol}, this program {VERSION} and {PROTOCOL}"
            )),
            Ok((other, _)) => Some(format!("it began with {other:?}")),
            Err(error) => Some(with_causes(&error)),
        };
        let limited = socket.receive_within(Some(LOOK));
        let why = why.or_else(|| Some(limited.err()?.to_string()));
        if let Some(why) = why {
            return Err(program.refused(match child.end() {
                Some(how) => format!("{why}; it ended: {how}"),
                None => why,
            }));
        }
        let failed = |error: &dyn Error| program.start_error(&io::Error::other(with_causes(error)));
        let peer = format!("worker {}", child.pid);
        let (pages, far) = PageLink::pair(peer).map_err(|error| failed(&error))?;
        let (outbox, unsent) = channel();
        let link = Arc::new(Link {
            pid: child.pid,
            socket,
            pages,
            outbox,
            berths: AtomicUsize::new(0),
            numbers: AtomicU64::new(0),
            families: Mutex::default(),
            ready,
            shells: Shells::default(),
            points: Mutex::default(),
            state: Mutex::default(),
            died: Condvar::new(),
        });
        let worker = Worker { link };
        let link = worker.link.clone();
        link.send_with(&Order::Pages, &[far.as_fd()])
            .map_err(|error| failed(&error))?;
        let lost = {
            let link = Arc::downgrade(&link);
            move || {
                if let Some(link) = link.upgrade() {
                    link.socket.close();
                }
            }
        };
        link.pages.serve(lost).map_err(|error| failed(&error))?;
        send_in_turn(&link, unsent).map_err(|error| failed(&error))?;
        let thread = thread::Builder::new().name(format!("worker-{}", link.pid));
        // It ends with the worker.
        let _detached = thread
            .spawn(move || link.hear(child))
            .map_err(|error| failed(&error))?;
        Ok(worker)
    }
}

impl OwnChild {
    /// Kills it, if it has not ended by itself: one that is ending does so as it had begun.
    fn kill(&mut self) {
        if let Some(Err(error)) = self.child.as_mut().map(Child::kill) {
            tracing::debug!(%error, "a worker that has ended");
        }
    }

    /// Ends it and says how it ended; `None` if it does not go away.
    fn end(&mut self) -> Option<String> {
        self.kill();
        wait_for_end(&mut self.child.take()?)
    }
}

impl Drop for OwnChild {
    fn drop(&mut self) {
        self.end();
    }
}

impl Link {
    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A number that was never given.
    pub(super) fn number(&self) -> u64 {
        self.numbers.fetch_add(1, Ordering::Relaxed) + 1
    }

    pub(super) fn send(&self, order: &Order) -> Result<(), WorkerError> {
        self.send_with(order, &[])
    }

    pub(super) fn send_with(
        &self,
        order: &Order,
        files: &[BorrowedFd<'_>],
    ) -> Result<(), WorkerError> {
        match self.socket.send(order, files) {
            Ok(()) => Ok(()),
            Err(SocketError::Closed) => Err(self.death()),
            Err(error) => Err(WorkerError::Unreached {
                pid: self.pid,
                why: with_causes(&error),
            }),
        }
    }

    /// How it ended, once that is known: the socket is closed a moment before.
    pub(super) fn death(&self) -> WorkerError {
        let until = Instant::now() + 2 * GOING;
        let mut state = self.state();
        loop {
            if let Some(death) = &state.death {
                return death.clone();
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return WorkerError::Unreached {
                    pid: self.pid,
                    why: "its socket is closed".into(),
                };
            }
            let waited = self.died.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Has it sent by another thread, soon: for the thread that hears the worker, which could wait for
    /// itself, and for whoever drops something there.
    pub(super) fn send_later(&self, order: Order) {
        if self.outbox.send(order).is_err() {
            tracing::error!(pid = self.pid, "nobody sends to a worker, so it ends");
            self.socket.close();
        }
    }

    pub(super) fn pages(&self) -> &Arc<PageLink> {
        &self.pages
    }

    pub(super) fn shells(&self) -> &Shells {
        &self.shells
    }

    pub(super) fn close(&self) {
        self.socket.close();
    }

    /// What is known of a clone that is forked.
    pub(super) fn parent(&self, clone: u64) -> Option<Parent> {
        self.state().residents.get(&clone).map(Resident::as_parent)
    }

    /// Keeps what came of a fork point of the worker's until the worker forgets that. Its clones end if it
    /// has died: nobody would learn of them.
    pub(super) fn keep(&self, point: u64, born: Born) {
        let unheard = {
            let mut state = self.state();
            if state.death.is_none() {
                state.born.insert(point, born);
                return;
            }
            born
        };
        unheard.clones.iter().for_each(|clone| clone.kill());
    }

    /// Keeps why not, for whoever asked.
    pub(super) fn keep_refusal(&self, point: u64, error: ForkError) {
        let mut state = self.state();
        if state.death.is_none() {
            state.refused.insert(point, error);
        }
    }

    /// Has the worker know `family`.
    pub(super) fn hand_over_family(self: &Arc<Self>, family: &Family) -> Result<(), WorkerError> {
        let number = family.handed_out.number();
        let mut families = lock(&self.families);
        if families.contains(&number) {
            return Ok(());
        }
        self.send(&Order::Family {
            family: number,
            faults: family.config().faults,
            pool: family.config().pool.shared_by(self.ready),
            guest_forks: family.config().guest_forks.clone(),
        })?;
        families.insert(number);
        family.handed_out.keep(Box::new(HandedOver {
            link: Arc::downgrade(self),
            what: Handed::Family(number),
        }));
        Ok(())
    }

    /// Has the worker know `point`. `description` is that of the point, once somebody needs it.
    pub(super) fn hand_over(
        self: &Arc<Self>,
        point: &ForkPoint,
        description: &OnceCell<Description>,
    ) -> Result<(), SpawnError> {
        self.hand_over_family(&point.family)?;
        let number = point.handed_out.number();
        let mut points = lock(&self.points);
        if points.contains(&number) {
            return Ok(());
        }
        let Description { files, filling } = match description.get() {
            Some(description) => description,
            None => {
                let described = point.describe()?;
                description.get_or_init(|| described)
            }
        };
        for image in filling {
            self.pages.offer(image, point.touches.clone());
        }
        let files: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
        let order = Order::ForkPoint {
            point: number,
            family: point.family.handed_out.number(),
        };
        self.send_with(&order, &files)?;
        points.insert(number);
        point.handed_out.keep(Box::new(HandedOver {
            link: Arc::downgrade(self),
            what: Handed::Point(number),
        }));
        Ok(())
    }

    /// Asks for `shells` shells of the shape of the state in `state`. `filled` hears how many there are then,
    /// or nothing when the worker dies.
    pub(super) fn ask_to_fill(
        self: &Arc<Self>,
        family: &Family,
        state: &File,
        shells: u32,
        filled: Sender<Result<u32, String>>,
    ) -> Result<(), WorkerError> {
        self.hand_over_family(family)?;
        let (request, file) = (self.number(), state);
        {
            let mut state = self.state();
            if let Some(death) = &state.death {
                return Err(death.clone());
            }
            state.filling.insert(request, Asked::now(filled));
        }
        let order = Order::Fill {
            request,
            family: family.handed_out.number(),
            shells,
        };
        let sent = self.send_with(&order, &[file.as_fd()]);
        sent.inspect_err(|_| drop(self.state().filling.remove(&request)))
    }

    /// Has the worker end a clone; `false` when it has ended.
    pub(super) fn kill(&self, clone: u64) -> bool {
        {
            let mut state = self.state();
            if !state.residents.contains_key(&clone) {
                return false;
            }
            state.killed.entry(clone).or_insert_with(Instant::now);
        }
        // Should it not be reached, it ends with all its clones.
        self.send(&Order::Kill { clone }).is_ok()
    }

    /// Hears the worker until it has ended. Then its clones have ended too.
    fn hear(self: Arc<Self>, mut child: OwnChild) {
        let why = loop {
            match self.socket.receive() {
                Ok((told, files)) => {
                    // Much of it comes to code of the embedder's, and nobody else hears this worker.
                    let told = AssertUnwindSafe(|| self.told(told, files));
                    if catch_unwind(told).is_err() {
                        break Some("what it told made the engine panic".to_owned());
                    }
                }
                Err(SocketError::Silent) => {}
                Err(SocketError::Closed) => break None,
                Err(error) => break Some(with_causes(&error)),
            }
            if let Some(overdue) = self.state().overdue() {
                break Some(format!("{overdue} for {ANSWER:?}"));
            }
        };
        self.socket.close();
        self.pages.close();
        let userfaults = mem::take(&mut self.state().userfaults);
        // Not before it is killed: a guest that still runs must not see the zero pages.
        child.kill();
        last_faults::answer(self.pid, userfaults.into_values().flatten().collect());
        let ended = child.end().unwrap_or_else(|| "it does not go away".into());
        let how = match why {
            Some(why) => format!("{why}; {ended}"),
            None if ended.contains("SIGKILL") => format!("{ended}, {KILLED}"),
            None => ended,
        };
        let death = WorkerError::Died { pid: self.pid, how };
        let mut state = self.state();
        let dead = State {
            death: Some(death.clone()),
            ..State::default()
        };
        let State {
            residents,
            preparing,
            filling,
            requests,
            born,
            refused: _,
            forking: _,
            death: _,
            killed: _,
            userfaults: _,
        } = mem::replace(&mut *state, dead);
        drop(state);
        self.died.notify_all();
        if residents.is_empty() {
            tracing::debug!(pid = self.pid, %death, "a worker without clones has ended");
        } else {
            let clones = residents.len();
            tracing::error!(%death, clones, "a worker has died, and its clones with it");
        }
        // Whoever waits for them hears that nothing comes any more.
        drop((preparing, filling, requests));
        for Born { clones, .. } in born.into_values() {
            // Their parent did not live to learn of them.
            clones.iter().for_each(|clone| clone.kill());
        }
        for resident in residents.into_values() {
            let died = AssertUnwindSafe(|| resident.died(&death));
            if catch_unwind(died).is_err() {
                tracing::error!("whoever heard of the end of a clone panicked");
            }
        }
    }

    fn told(self: &Arc<Self>, told: Told, files: Result<Vec<OwnedFd>, SocketError>) {
        match told {
            Told::Watches { family } => match files {
                Ok(files) => drop(self.state().userfaults.insert(family, files)),
                Err(error) => {
                    // Its death could cost other workers' clones their memory.
                    let (pid, error) = (self.pid, with_causes(&error));
                    tracing::error!(
                        pid,
                        error,
                        "a worker whose faults could not be answered ends"
                    );
                    self.socket.close();
                }
            },
            Told::Hello { .. } => tracing::error!(pid = self.pid, "a worker greets twice"),
            Told::Prepared { clone, outcome } => {
                let asked = self.state().preparing.remove(&clone);
                if let Some(asked) = asked {
                    asked.answer(outcome);
                }
            }
            Told::Filled { request, outcome } => {
                let asked = self.state().filling.remove(&request);
                if let Some(asked) = asked {
                    asked.answer(outcome);
                }
            }
            Told::Ran { clone, at } => {
                self.with(clone, |watch| watch.ran(watch.life(), at.into()));
            }
            Told::Acted { clone, at } => {
                self.with(clone, |watch| watch.acted(watch.life(), at.into()));
            }
            Told::Reported { clone, value, at } => {
                self.with(clone, |watch| {
                    watch.reported(watch.life(), value, at.into());
                });
            }
            Told::Reborn {
                clone,
                identity,
                asked,
                built,
                restored,
            } => self.with(clone, |watch| {
                let timeline = Timeline {
                    spawn_requested: Some(asked.into()),
                    built: Some(built.into()),
                    restored: Some(restored.into()),
                    ..Timeline::default()
                };
                watch.begin_next_life(identity, timeline);
            }),
            Told::Identified { clone, identity } => {
                self.with(clone, |watch| watch.identify(identity));
            }
            Told::Froze {
                clone,
                point,
                by_guest,
                clones,
                requested,
                phases,
                paused,
            } => {
                let froze = Froze {
                    clone,
                    point,
                    by_guest,
                    clones,
                    requested: requested.into(),
                    phases,
                    paused,
                    files,
                };
                forks::spawn(self, froze);
            }
            Told::Forget { point } => {
                let forgotten = self.state().born.remove(&point);
                // Not under the lock: the fork point may go with it.
                drop(forgotten);
            }
            Told::Forked { request, outcome } => match self.request(request) {
                Some(Request::Fork(reply)) => reply.give(self.forked(outcome)),
                Some(Request::ForkPoint(reply)) => {
                    reply.give(self.forked(outcome).map(|ticket| ticket.point));
                }
                _ => tracing::error!(request, "a worker answers what it was not asked"),
            },
            Told::Rewound { request, outcome } => match self.request(request) {
                Some(Request::Rewind(reply)) => {
                    reply.give(outcome.map_err(|not_rewound| match not_rewound {
                        NotRewound::Shadowed => RewindError::Shadowed,
                        NotRewound::Ended => RewindError::Ended,
                        NotRewound::Failed(why) => RewindError::InWorker {
                            process: self.pid,
                            why,
                        },
                    }));
                }
                _ => tracing::error!(request, "a worker answers what it was not asked"),
            },
            Told::Printed { clone, bytes } => {
                let resident = self.state();
                let console = resident.residents.get(&clone).map(Resident::console);
                drop(resident);
                if let Some(console) = console {
                    console.print(&bytes, || self.kill_later(clone));
                }
            }
            Told::Taken { request, bytes } => match self.request(request) {
                Some(Request::Input(reply)) => reply.give(bytes),
                _ => tracing::error!(request, "a worker answers what it was not asked"),
            },
            Told::Saved { request, failed } => match self.request(request) {
                Some(Request::Save(reply)) => reply.give(match failed {
                    None => Ok(()),
                    Some(why) => Err(crate::saved::SaveError::Elsewhere {
                        process: self.pid,
                        why,
                    }),
                }),
                _ => tracing::error!(request, "a worker answers what it was not asked"),
            },
            Told::Held { request, failed } => match self.asked(request) {
                Some((clone, Request::Hold(held, reply))) => reply.give(match failed {
                    None => {
                        self.with(clone, |watch| watch.hold(held));
                        Ok(())
                    }
                    Some(why) => Err(HoldError::InWorker {
                        process: self.pid,
                        why,
                    }),
                }),
                _ => tracing::error!(request, "a worker answers what it was not asked"),
            },
            Told::Fallbacks { request, counts } => match self.request(request) {
                Some(Request::Fallbacks(reply)) => reply.give(counts),
                _ => tracing::error!(request, "a worker answers what it was not asked"),
            },
            Told::MemoryUsed { request, outcome } => match self.request(request) {
                Some(Request::MemoryUse(reply)) => reply.give(match outcome {
                    Ok(taken) => Ok(VmCount::elsewhere(taken)),
                    Err(why) => Err(AccountingError::Elsewhere {
                        process: self.pid,
                        why,
                    }),
                }),
                _ => tracing::error!(request, "a worker answers what it was not asked"),
            },
            Told::Ended {
                clone,
                end,
                counters,
                disks,
            } => {
                let resident = {
                    let mut state = self.state();
                    state.requests.retain(|_, (of, _)| *of != clone);
                    state.killed.remove(&clone);
                    state.residents.remove(&clone)
                };
                match resident {
                    Some(resident) => resident.ended(end, counters, &disks, files),
                    None => tracing::error!(clone, "a worker tells the end of an unknown clone"),
                }
            }
        }
    }

    /// What came of a fork that the host had asked for.
    fn forked(&self, outcome: Result<ForkMade, NotForked>) -> Result<Ticket, ForkError> {
        let failed = |why: &str| ForkError::InWorker {
            process: self.pid,
            why: why.into(),
        };
        match outcome {
            Ok(ForkMade { ticket, point }) => {
                let born = self.state().born.remove(&point);
                let Born { point, clones } =
                    born.ok_or_else(|| failed("it speaks of a fork point that never came"))?;
                Ok(Ticket {
                    id: ticket,
                    clones,
                    point,
                })
            }
            Err(NotForked::Limits(limits)) => Err(limits.into()),
            Err(NotForked::Refused { point }) => {
                let refused = self.state().refused.remove(&point);
                Err(refused.unwrap_or_else(|| failed("the engine has gone")))
            }
            Err(NotForked::Failed(why)) => Err(failed(&why)),
        }
    }

    /// Kills a clone from the thread that hears the worker.
    fn kill_later(&self, clone: u64) {
        let is_there = {
            let mut state = self.state();
            let is_there = state.residents.contains_key(&clone);
            if is_there {
                state.killed.entry(clone).or_insert_with(Instant::now);
            }
            is_there
        };
        if is_there {
            self.send_later(Order::Kill { clone });
        }
    }

    fn request(&self, number: u64) -> Option<Request> {
        self.asked(number).map(|(_clone, request)| request)
    }

    /// What was asked, and of which clone.
    fn asked(&self, number: u64) -> Option<(u64, Request)> {
        self.state().requests.remove(&number)
    }

    fn with(&self, clone: u64, act: impl FnOnce(&Watch)) {
        let state = self.state();
        let watch = state.residents.get(&clone).map(Resident::watch);
        drop(state);
        if let Some(watch) = watch {
            act(&watch);
        }
    }
}

impl Drop for HandedOver {
    fn drop(&mut self) {
        let Some(link) = self.link.upgrade() else {
            return;
        };
        // Whoever hands something over sends under the lock of what is there: not to be taken here.
        link.send_later(match self.what {
            Handed::Family(family) => Order::ForgetFamily { family },
            Handed::Point(point) => Order::Forget { point },
        });
    }
}

/// Sends what is to be sent later, in a thread that ends with the link.
fn send_in_turn(link: &Arc<Link>, unsent: Receiver<Order>) -> io::Result<()> {
    let (pid, link) = (link.pid, Arc::downgrade(link));
    let send = move || {
        while let Ok(order) = unsent.recv() {
            let Some(link) = link.upgrade() else { return };
            match &order {
                Order::ForgetFamily { family } => {
                    lock(&link.families).remove(family);
                    link.shells.forget(*family);
                    // All its VMs have ended.
                    drop(link.state().userfaults.remove(family));
                }
                Order::Forget { point } => drop(lock(&link.points).remove(point)),
                _ => {}
            }
            if let Err(error) = link.send(&order) {
                tracing::trace!(%error, "what was to be sent comes after the worker's end");
            }
        }
    };
    let thread = thread::Builder::new().name(format!("tell-{pid}"));
    thread.spawn(send).map(|_detached| ())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits for the end of a process that was killed, and says how it ended. `None` if it does not go
/// away: that can only be the kernel's doing.
fn wait_for_end(child: &mut Child) -> Option<String> {
    let until = Instant::now() + GOING;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status.to_string()),
            Ok(None) if Instant::now() < until => thread::sleep(Duration::from_millis(1)),
            Ok(None) => return None,
            Err(error) => return Some(format!("and how cannot be known: {error}")),
        }
    }
}
