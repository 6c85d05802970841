//! A worker: a process in which clones run whose parents live in another one, the engine.
//!
//! The engine starts it by exec ahead of time ([`crate::spawn::process`]) and hands it fork points:
//! state, memory images, disks, all by open descriptor. Here each clone is a [`Member`] like any
//! other, built by the same code and served by a thread of its own; what it prints, reports and ends
//! as goes to the engine, and what holders of its handle ask comes from there. Whoever embeds the
//! engine calls [`serve`] in the program that it names as its worker, which may be its own.
//!
//! **A worker ends with its engine.** It keeps no clone alive that nobody can reach: when the socket is
//! closed, or cannot be used any more, it ends its clones and exits. In that order: a clone that missed a page
//! when the process just went would have the kernel put a zero page into the image, which other workers
//! still map (`VmMemory::abandon`). It does not heed
//! signals that a terminal or a service manager sends to a whole group of processes: the engine ends
//! a family in its order, and its workers after it.
//!
//! It chooses nothing and spawns nothing: a clone that forks is frozen here, and its clones are made by the
//! engine (`worker/forks.rs`).
#![allow(unsafe_code)] // signal(2).

mod console;
mod forks;
mod home;
mod teller;

use std::collections::HashMap;
use std::convert::Infallible;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::process;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use forkvm_vmm::{Kvm, PausedVm};
use thiserror::Error;

use crate::accounting::VmCount;
use crate::descriptor;
use crate::end::End;
use crate::fork::{CloneSpec, ForkError, Ticket};
use crate::fork_point::ForkPoint;
use crate::identity::Identity;
use crate::limits;
use crate::member::{Ask, Member, Reply, Waiting, with_causes};
use crate::page_link::{Landing, PageLink};
use crate::phase::{self, NoObserver, Observer, Phase, Vetoed};
use crate::rewind::{RewindError, RewindWay};
use crate::spawn::SpawnError;
use crate::spawn::in_process::Unbuilt;
use crate::userfault::UserfaultError;
use crate::vsock::VsockEnd;
use crate::wire::socket::{Received, Socket, SocketError};
use crate::wire::{NotRewound, Order, PROTOCOL, Readiness, Told, VERSION};

use console::Consoles;
use forks::Answers;
use home::{Home, Settled};
use teller::Teller;

/// How long the clones of a worker may take to end when its engine has gone.
const ENDING: Duration = Duration::from_secs(10);

/// Runs clones for the engine at the other end of `socket`, which this process was started with. The
/// process ends in here when the engine has gone; it comes back only with a reason not to begin.
pub fn serve(socket: OwnedFd) -> Result<Infallible, ServeError> {
    serve_watched(socket, Arc::new(NoObserver))
}

/// The same, with an observer in the worker itself. It enters and leaves the phases of each clone's making
/// here, and those of a fork of such a clone until the image is published, as they happen; it may refuse each
/// but the last, *run*: then the worker ends.
pub fn serve_watched(
    socket: OwnedFd,
    observer: Arc<dyn Observer>,
) -> Result<Infallible, ServeError> {
    let engine = Arc::new(Engine(Socket::inherited(socket)?));
    ignore_signals_of_the_group();
    if let Err(error) = limits::raise_nofile() {
        tracing::warn!(%error, "RLIMIT_NOFILE could not be raised: few clones will fit");
    }
    let kvm = Kvm::open();
    engine.tell(
        &Told::Hello {
            protocol: PROTOCOL,
            version: VERSION.to_owned(),
            broken: kvm.as_ref().err().map(|error| with_causes(error)),
        },
        &[],
    );
    let consoles = Consoles::start(engine.clone()).map_err(ServeError::Thread)?;
    let worker = Worker {
        kvm: Arc::new(kvm?),
        engine,
        observer,
        consoles,
        answers: Arc::default(),
        homes: HashMap::new(),
        points: HashMap::new(),
        pages: None,
        prepared: HashMap::new(),
        running: Arc::default(),
    };
    worker.obey()
}

/// Why a process does not become a worker.
#[derive(Debug, Error)]
pub enum ServeError {
    /// It was not started by an engine.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// KVM cannot be used.
    #[error(transparent)]
    Kvm(#[from] forkvm_vmm::KvmError),
    /// No thread for consoles.
    #[error("starting a thread for consoles failed")]
    Thread(#[source] std::io::Error),
}

/// The engine, as a worker sees it.
struct Engine(Socket);

impl Engine {
    /// Tells the engine something. A worker that cannot be heard is of no use to anybody: it ends.
    fn tell(&self, told: &Told, files: &[BorrowedFd<'_>]) {
        match self.0.send(told, files) {
            Ok(()) | Err(SocketError::Closed) => {}
            Err(error) => {
                tracing::error!(
                    error = with_causes(&error),
                    "the engine cannot be told, so this worker ends"
                );
                // Whoever receives finds it closed, and ends it in its order.
                self.0.close();
            }
        }
    }
}

/// Clones that run, by their numbers.
#[derive(Default)]
struct Clones(Mutex<HashMap<u64, Arc<Member>>>);

impl Clones {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Arc<Member>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What came with an order.
type Files = Result<Vec<OwnedFd>, SocketError>;

struct Worker {
    kvm: Arc<Kvm>,
    engine: Arc<Engine>,
    observer: Arc<dyn Observer>,
    consoles: Consoles,
    answers: Arc<Answers>,
    /// By the numbers of the engine's families.
    homes: HashMap<u64, Home>,
    /// Fork points with their families, or why one cannot be had.
    points: HashMap<u64, Result<(u64, Arc<ForkPoint>), String>>,
    /// From the first order on.
    pages: Option<Arc<PageLink>>,
    prepared: HashMap<u64, Waiting>,
    running: Arc<Clones>,
}

impl Worker {
    /// Does what the engine says, one thing after the other, until it has gone.
    fn obey(mut self) -> ! {
        loop {
            match self.engine.0.receive() {
                Ok(order) => self.carry_out(order),
                Err(SocketError::Closed) => break,
                Err(error) => {
                    tracing::error!(
                        error = with_causes(&error),
                        "the engine cannot be heard, so this worker ends"
                    );
                    self.engine.0.close();
                    break;
                }
            }
        }
        self.end()
    }

    /// Ends all clones, and the process.
    fn end(mut self) -> ! {
        self.answers.close();
        self.prepared.clear();
        let running: Vec<Arc<Member>> = self.running.lock().values().cloned().collect();
        running.iter().for_each(|clone| clone.kill());
        let until = Instant::now() + ENDING;
        for clone in &running {
            let left = until.saturating_duration_since(Instant::now());
            if clone.wait_for(left).is_none() {
                tracing::error!(clone = clone.name(), "a clone does not end");
                process::exit(1);
            }
        }
        process::exit(0)
    }

    fn carry_out(&mut self, (order, files): Received<Order>) {
        match order {
            Order::Pages => match self.pages_by(files) {
                Ok(pages) => self.pages = Some(pages),
                Err(error) => {
                    let error = with_causes(&*error);
                    tracing::error!(error, "no page could be asked for, so this worker ends");
                    self.engine.0.close();
                }
            },
            Order::Family {
                family,
                faults,
                pool,
                guest_forks,
            } => {
                let observer = self.observer.clone();
                let settled = Settled {
                    faults,
                    pool,
                    guest_forks,
                    observer,
                };
                self.settle(family, settled);
            }
            Order::ForgetFamily { family } => drop(self.homes.remove(&family)),
            Order::ForkPoint { point, family } => {
                let taken = self.take_over(family, files);
                let taken = taken.map_err(|error| with_causes(&*error));
                let taken = taken.map(|point| (family, Arc::new(point)));
                self.points.insert(point, taken);
            }
            Order::Fill {
                request,
                family,
                shells,
            } => {
                let filled = self.fill(family, files, shells);
                let outcome = filled.map_err(|error| with_causes(&*error));
                self.engine.tell(&Told::Filled { request, outcome }, &[]);
            }
            Order::Forget { point } => drop(self.points.remove(&point)),
            Order::Prepare {
                point,
                clone,
                identity,
                granted,
                save_to,
                vsock,
            } => {
                let vsock = adopt_vsock(vsock, files, &identity);
                let outcome = vsock.and_then(|vsock| {
                    self.prepare(point, clone, identity, granted, save_to, vsock)
                });
                self.engine.tell(&Told::Prepared { clone, outcome }, &[]);
            }
            Order::Start { clone } => self.start(clone),
            Order::Drop { clone } => drop(self.prepared.remove(&clone)),
            Order::Kill { clone } => self.kill(clone),
            Order::Input {
                clone,
                request,
                bytes,
            } => {
                let engine = self.engine.clone();
                let reply = move |bytes| engine.tell(&Told::Taken { request, bytes }, &[]);
                self.ask(clone, Ask::Input(bytes, Reply::new(reply)));
            }
            Order::MemoryUse { clone, request } => {
                let engine = self.engine.clone();
                let reply = move |count: Result<VmCount, _>| {
                    let outcome = match count {
                        Ok(count) => Ok(count.taken),
                        Err(error) => Err(with_causes(&error)),
                    };
                    engine.tell(&Told::MemoryUsed { request, outcome }, &[]);
                };
                self.ask(clone, Ask::MemoryUse(Reply::new(reply)));
            }
            Order::Hold {
                clone,
                request,
                held,
            } => {
                let engine = self.engine.clone();
                let reply = move |done: Result<(), _>| {
                    let failed = done.err().map(|error| with_causes(&error));
                    engine.tell(&Told::Held { request, failed }, &[]);
                };
                self.ask(clone, Ask::Hold(held, Reply::new(reply)));
            }
            Order::Fallbacks { clone, request } => {
                let engine = self.engine.clone();
                let reply = move |counts| engine.tell(&Told::Fallbacks { request, counts }, &[]);
                self.ask(clone, Ask::Fallbacks(Reply::new(reply)));
            }
            Order::Save {
                clone,
                request,
                dir,
            } => {
                let engine = self.engine.clone();
                let reply = move |saved: Result<(), _>| {
                    let failed = saved.err().map(|error| with_causes(&error));
                    engine.tell(&Told::Saved { request, failed }, &[]);
                };
                self.ask(clone, Ask::Save(dir, Reply::new(reply)));
            }
            Order::Rewind {
                clone,
                request,
                way,
            } => self.rewind(clone, request, way),
            Order::Fork {
                clone,
                request,
                spec,
                point_only,
                at,
            } => self.fork(clone, request, spec, point_only, at.into()),
            Order::Spawned { point, outcome } => self.answers.spawned(point, outcome),
            Order::CloneEnded { point, index, end } => self.answers.ended(point, index, end),
        }
    }

    fn running(&self, clone: u64) -> Option<Arc<Member>> {
        self.running.lock().get(&clone).cloned()
    }

    /// Of one that has ended nothing is asked any more: the engine hears of the end.
    fn ask(&self, clone: u64, ask: Ask) {
        if !self
            .running(clone)
            .is_some_and(|member| member.ask_later(ask))
        {
            tracing::trace!(clone, "asked after its end");
        }
    }

    fn fork(&self, clone: u64, request: u64, spec: CloneSpec, point_only: bool, at: Instant) {
        let engine = self.engine.clone();
        let tell = move |forked: Result<(u32, Arc<ForkPoint>), ForkError>| {
            let (outcome, _until_told) = forks::told(forked);
            engine.tell(&Told::Forked { request, outcome }, &[]);
        };
        let ask = if point_only {
            let reply = move |made: Result<_, _>| tell(made.map(|point| (0, point)));
            Ask::ForkPoint(spec, at, Reply::new(reply))
        } else {
            let reply =
                move |made: Result<Ticket, _>| tell(made.map(|ticket| (ticket.id, ticket.point)));
            Ask::Fork(spec, at, Reply::new(reply))
        };
        self.ask(clone, ask);
    }

    fn rewind(&self, clone: u64, request: u64, way: RewindWay) {
        let engine = self.engine.clone();
        let reply = move |rewound: Result<RewindWay, RewindError>| {
            let outcome = rewound.map_err(|error| match error {
                RewindError::Shadowed => NotRewound::Shadowed,
                RewindError::Ended => NotRewound::Ended,
                error => NotRewound::Failed(with_causes(&error)),
            });
            engine.tell(&Told::Rewound { request, outcome }, &[]);
        };
        let ask = Ask::Rewind(way, Instant::now(), Reply::new(reply));
        self.ask(clone, ask);
    }

    /// A family's clones will come.
    fn settle(&mut self, family: u64, settled: Settled) {
        let Some(pages) = &self.pages else {
            tracing::error!("a family came before all pages, so this worker ends");
            return self.engine.0.close();
        };
        let (kvm, engine, answers) = (&self.kvm, &self.engine, &self.answers);
        let home = Home::new(kvm, engine, pages, answers, settled);
        self.homes.insert(family, home);
    }

    fn home(&self, family: u64) -> Result<&Home, &'static str> {
        self.homes.get(&family).ok_or("its family never came")
    }

    fn fill(
        &self,
        family: u64,
        files: Files,
        shells: u32,
    ) -> Result<u32, Box<dyn std::error::Error>> {
        let file = files?.into_iter().next().ok_or("it came without a state")?;
        let state = descriptor::state_of(&file.into())?;
        let pool = self.home(family)?.family.pool();
        Ok(pool.fill(&Arc::new(state), shells)?)
    }

    fn take_over(
        &self,
        family: u64,
        files: Files,
    ) -> Result<ForkPoint, Box<dyn std::error::Error>> {
        let home = self.home(family)?;
        let landing = Landing {
            family: &home.family,
            link: self.pages.as_ref().ok_or("it came before all pages")?,
        };
        let point = ForkPoint::from_description(
            &home.family,
            files?,
            &landing,
            // When it was asked for only the engine has to know.
            Instant::now(),
            &Arc::default(),
        )?;
        // Also where this worker fills it: others map it too.
        if !point
            .image
            .mapped()
            .iter()
            .all(|(_, image)| image.is_whole())
        {
            self.watch(family, home)?;
        }
        Ok(point)
    }

    fn pages_by(&self, files: Files) -> Result<Arc<PageLink>, Box<dyn std::error::Error>> {
        let socket = files?.into_iter().next().ok_or("no socket came for them")?;
        let pages = PageLink::inherited("the engine".into(), socket)?;
        let engine = self.engine.clone();
        // Without pages a clone is lost, and so is whoever would wait for it.
        pages.serve(move || engine.0.close())?;
        Ok(pages)
    }

    /// From here on clones of `home` may wait for pages, and the engine can answer them if this process
    /// dies.
    fn watch(&self, family: u64, home: &Home) -> Result<(), UserfaultError> {
        if !home.watched.get() {
            let copies = home.family.faults().duplicates()?;
            let copies: Vec<BorrowedFd<'_>> = copies.iter().map(AsFd::as_fd).collect();
            self.engine.tell(&Told::Watches { family }, &copies);
            home.watched.set(true);
        }
        Ok(())
    }

    fn point(&self, number: u64) -> Result<(u64, Arc<ForkPoint>), String> {
        match self.points.get(&number) {
            Some(point) => point.clone(),
            None => Err("its fork point was never handed over".into()),
        }
    }

    fn prepare(
        &mut self,
        point: u64,
        clone: u64,
        identity: Identity,
        granted: u32,
        save_to: Option<PathBuf>,
        vsock: Option<Arc<VsockEnd>>,
    ) -> Result<Readiness, String> {
        let (family, point) = self.point(point)?;
        // What would be hit later may be a thread's stack, which ends the whole process.
        limits::check_own(&point.need_here()).map_err(|error| with_causes(&error))?;
        let console = self.consoles.open(clone);
        let places = &self.home(family)?.places;
        let witness = Teller {
            clone,
            below: point.disks.iter().map(|(below, _)| below.clone()).collect(),
            _place: places.add(&identity, clone, console.clone(), save_to),
            console,
            engine: self.engine.clone(),
            running: self.running.clone(),
        };
        let unbuilt = Unbuilt {
            identity,
            granted,
            // The engine knows when it was.
            asked: Instant::now(),
            witness: Some(Arc::new(witness)),
            vsock,
        };
        let phases = Phases {
            observer: self.observer.clone(),
            lengths: Mutex::default(),
        };
        let waiting = unbuilt.build(&point, &phases);
        let waiting = waiting.map_err(|error| with_causes(&error))?;
        let timeline = waiting.member().timeline();
        let (Some(built), Some(restored)) = (timeline.built, timeline.restored) else {
            return Err("it was built without passing its end points".into());
        };
        self.prepared.insert(clone, waiting);
        Ok(Readiness {
            phases: phases
                .lengths
                .into_inner()
                .unwrap_or_else(PoisonError::into_inner),
            built: built.into(),
            restored: restored.into(),
            shells: point.family.pool().ready(point.config()),
        })
    }

    fn kill(&mut self, clone: u64) {
        if let Some(member) = self.running(clone) {
            member.kill();
        } else if self.prepared.remove(&clone).is_some() {
            // The family ended between the clone's entry and its start, which will be of no effect.
            let told = Told::Ended {
                clone,
                end: End::Killed,
                counters: Vec::new(),
                disks: Vec::new(),
            };
            self.engine.tell(&told, &[]);
        }
    }

    fn start(&mut self, clone: u64) {
        let Some(waiting) = self.prepared.remove(&clone) else {
            tracing::debug!(clone, "it was killed before its start");
            return;
        };
        // Before it runs: its end takes it out.
        self.running.lock().insert(clone, waiting.member().clone());
        let started = || -> Result<(), SpawnError> {
            let phase = phase::begin(&*self.observer, Phase::Run, None)?;
            waiting.start()?;
            phase.done();
            Ok(())
        };
        if let Err(error) = started() {
            // Its thread is gone, which only a lack of the most basic things explains, or it was refused.
            tracing::error!(
                error = with_causes(&error),
                "a prepared clone cannot start, so this worker ends"
            );
            self.engine.0.close();
        }
    }
}

/// A clone's end of its vsock, whose socket came with the order.
fn adopt_vsock(
    path: Option<PathBuf>,
    files: Files,
    identity: &Identity,
) -> Result<Option<Arc<VsockEnd>>, String> {
    let Some(path) = path else {
        return Ok(None);
    };
    let files = files.map_err(|error| with_causes(&error))?;
    let socket = files.into_iter().next();
    let socket = socket.ok_or("it came without the socket of its vsock")?;
    let end = VsockEnd::adopt(socket, path, identity).map_err(|error| with_causes(&error))?;
    Ok(Some(Arc::new(end)))
}

/// Keeps the phases of one clone's making, of which the worker's observer hears.
struct Phases {
    observer: Arc<dyn Observer>,
    lengths: Mutex<Vec<(Phase, u64)>>,
}

impl Observer for Phases {
    fn enter(&self, phase: Phase, paused: Option<&PausedVm<'_>>) -> Result<(), Vetoed> {
        self.observer.enter(phase, paused)
    }

    fn leave(&self, phase: Phase, took: Duration) {
        let mut lengths = self.lengths.lock().unwrap_or_else(PoisonError::into_inner);
        lengths.push((phase, took.as_nanos() as u64));
        drop(lengths);
        self.observer.leave(phase, took);
    }

    fn parent_paused(&self, _took: Duration) {}

    fn forked(&self, _point: &Arc<ForkPoint>, _clones: &[Arc<Member>]) {}
}

fn ignore_signals_of_the_group() {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: the disposition is that no code runs.
        if unsafe { libc::signal(signal, libc::SIG_IGN) } == libc::SIG_ERR {
            let error = std::io::Error::last_os_error();
            tracing::warn!(%error, signal, "a signal could not be ignored");
        }
    }
}
