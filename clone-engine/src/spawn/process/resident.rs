//! A clone that lives in a worker, as the engine sees it: from the request for it to its end.

use std::cell::OnceCell;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::AtomicU32;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use forkvm_devices::block::BlockLayer;
use forkvm_devices::virtio::blk::BlkCounters;
use forkvm_vmm::FallbackCounts;

use super::forks::Parent;
use super::link::{Asked, Berth, Link};
use super::{FIRST_PHASE, WorkerError};
use crate::accounting::{AccountingError, VmCount};
use crate::descriptor::Description;
use crate::end::End;
use crate::family::Family;
use crate::fork::{CloneSpec, ForkError, Ticket};
use crate::fork_point::ForkPoint;
use crate::identity::Identity;
use crate::image::MemoryImage;
use crate::member::{Ask, Elsewhere, Finished, HoldError, Member, Reply, Watch};
use crate::phase::Observer;
use crate::rewind::{RewindError, RewindWay};
use crate::saved::SaveError;
use crate::spawn::in_process::{no_console, no_vsock};
use crate::spawn::{Prepared, SpawnError};
use crate::timeline::Timeline;
use crate::vsock::VsockEnd;
use crate::wire::disks::{self, HeldOverlay};
use crate::wire::socket::SocketError;
use crate::wire::{MOST_INPUT, Order, Readiness};

/// A clone that a worker was asked to prepare.
pub(super) struct Preparing {
    clone: Waiting,
    timeline: Timeline,
    answer: Receiver<Result<Readiness, String>>,
}

/// A clone that waits for its start in a worker. Dropped instead of started, it goes.
pub(super) struct Waiting {
    link: Arc<Link>,
    number: u64,
    family: Arc<Family>,
    watch: Arc<Watch>,
    member: Arc<Member>,
    started: bool,
}

/// What the engine keeps of a clone while the worker has it.
pub(super) struct Resident {
    _berth: Berth,
    family: Arc<Family>,
    watch: Arc<Watch>,
    /// From its start on.
    member: Option<Arc<Member>>,
    console: Arc<Console>,
    /// The file of its vsock's socket goes with it.
    _vsock: Option<Arc<VsockEnd>>,
    /// What its disks stand on.
    disks: Vec<Arc<dyn BlockLayer>>,
    /// Clones that it ever had.
    numbers: Arc<AtomicU32>,
    /// What its memory stands on: as long as it runs, pages may be missing.
    _image: Arc<MemoryImage>,
}

/// What a running clone was asked and has not answered yet.
pub(super) enum Request {
    Input(Reply<usize>),
    Save(Reply<Result<(), SaveError>>),
    Hold(bool, Reply<Result<(), HoldError>>),
    Fallbacks(Reply<Option<FallbackCounts>>),
    Fork(Reply<Result<Ticket, ForkError>>),
    ForkPoint(Reply<Result<Arc<ForkPoint>, ForkError>>),
    Rewind(Reply<Result<RewindWay, RewindError>>),
    MemoryUse(Reply<Result<VmCount, AccountingError>>),
}

/// The way from a handle to its clone.
struct Way {
    link: Weak<Link>,
    process: u32,
    number: u64,
}

/// Where what a clone prints goes.
pub(super) struct Console {
    writer: Mutex<Writer>,
}

struct Writer {
    to: Option<Box<dyn Write + Send>>,
    failed: bool,
    panicked: bool,
}

impl Preparing {
    /// Asks the worker of `berth` for the clone `identity` of `point`, which was wanted when it was `asked`
    /// for. `description` is that of the point,
    /// once somebody needs it.
    pub(super) fn ask(
        point: &ForkPoint,
        description: &OnceCell<Description>,
        identity: Identity,
        granted: u32,
        asked: Instant,
        berth: Berth,
    ) -> Result<Preparing, SpawnError> {
        let timeline = Timeline {
            fork_requested: Some(point.requested),
            spawn_requested: Some(asked),
            ..Timeline::default()
        };
        let family = &point.family;
        let link = berth.worker.link().clone();
        link.hand_over(point, description)?;
        let console = family.config().consoles.open(&identity);
        let console = console.map_err(no_console)?;
        let vsock = family.vsock_of(&identity).map_err(no_vsock)?;
        let (number, watch) = (link.number(), Arc::new(Watch::new(identity.clone(), None)));
        let way = Way {
            link: Arc::downgrade(&link),
            process: link.pid(),
            number,
        };
        let (name, config) = (identity.name.clone(), point.config().clone());
        let member = Member::elsewhere(name, config, Arc::new(way), watch.clone());
        let resident = Resident {
            _berth: berth,
            family: family.clone(),
            watch: watch.clone(),
            member: None,
            console: Arc::new(Console::new(console)),
            _vsock: vsock.clone(),
            disks: point
                .disks
                .iter()
                .map(|(content, _)| content.clone())
                .collect(),
            numbers: Arc::default(),
            _image: point.image.clone(),
        };
        let (waiting, answer) = channel();
        {
            let mut state = link.state();
            if let Some(death) = &state.death {
                return Err(death.clone().into());
            }
            state.residents.insert(number, resident);
            state.preparing.insert(number, Asked::now(waiting));
        }
        // From here on it is taken back when something fails.
        let clone = Waiting {
            link: link.clone(),
            number,
            family: family.clone(),
            watch,
            member: Arc::new(member),
            started: false,
        };
        let saver = family.config().saver.as_ref();
        let save_to = saver.and_then(|saver| saver.directory());
        let save_to = save_to.map(std::path::absolute).transpose();
        let save_to = save_to.map_err(no_working_directory)?;
        let vsock = vsock.as_deref().map(VsockEnd::parts);
        let path = vsock.map(|(_, path)| std::path::absolute(path)).transpose();
        let prepare = Order::Prepare {
            point: point.handed_out.number(),
            clone: number,
            identity,
            granted,
            save_to,
            vsock: path.map_err(no_working_directory)?,
        };
        let socket: Vec<_> = vsock.iter().map(|(socket, _)| socket.as_fd()).collect();
        link.send_with(&prepare, &socket)?;
        Ok(Preparing {
            clone,
            timeline,
            answer,
        })
    }

    /// Waits until it is prepared. `observer` hears of the phases afterwards, with their lengths there;
    /// the first one was begun when the worker was asked.
    pub(super) fn wait(self, observer: &dyn Observer) -> Result<Waiting, SpawnError> {
        let Preparing {
            clone,
            timeline,
            answer,
        } = self;
        let pid = clone.link.pid();
        let readiness = match answer.recv() {
            Ok(Ok(readiness)) => readiness,
            Ok(Err(why)) => return Err(SpawnError::InWorker { pid, why }),
            Err(_died) => return Err(clone.link.death().into()),
        };
        for (phase, took) in readiness.phases {
            if phase != FIRST_PHASE {
                observer.enter(phase, None)?;
            }
            let took = Duration::from_nanos(took);
            tracing::debug!(%phase, took_us = took.as_micros() as u64, worker = pid, "done");
            observer.leave(phase, took);
        }
        let (shells, config) = (clone.link.shells(), clone.member.config());
        shells.note(&clone.family, config, readiness.shells);
        clone.watch.begin(Timeline {
            built: Some(readiness.built.into()),
            restored: Some(readiness.restored.into()),
            ..timeline
        });
        Ok(clone)
    }
}

fn no_working_directory(source: io::Error) -> SpawnError {
    SpawnError::Host {
        what: "the working directory",
        source,
    }
}

impl Prepared for Waiting {
    fn start(mut self: Box<Self>) -> Result<Arc<Member>, SpawnError> {
        // From here on its end is told, also that of a worker that dies.
        let is_there = {
            let mut state = self.link.state();
            let resident = state.residents.get_mut(&self.number);
            resident
                .map(|resident| resident.member = Some(self.member.clone()))
                .is_some()
        };
        if !is_there {
            return Err(self.link.death().into());
        }
        // Before it runs: what a family that ends has not heard of it could not end.
        self.family.enter(&self.member)?;
        self.started = true;
        if !self.link.state().residents.contains_key(&self.number) {
            // It ended before it was a member.
            self.family.leave(&self.member);
        }
        // If the worker has died by now, whoever hears that ends the clone.
        let number = self.number;
        self.link.send(&Order::Start { clone: number })?;
        Ok(self.member.clone())
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if self.started {
            return;
        }
        let resident = {
            let mut state = self.link.state();
            state.preparing.remove(&self.number);
            state.residents.remove(&self.number)
        };
        let number = self.number;
        if resident.is_some()
            && let Err(error) = self.link.send(&Order::Drop { clone: number })
        {
            tracing::debug!(%error, "a clone that is not started went with its worker");
        }
    }
}

impl Elsewhere for Way {
    fn process(&self) -> u32 {
        self.process
    }

    fn ask(&self, ask: Ask) -> bool {
        let Some(link) = self.link.upgrade() else {
            return false;
        };
        let clone = self.number;
        match ask {
            Ask::Fork(spec, at, reply) => {
                let order = |request| fork(clone, request, spec, false, at);
                self.request(&link, Request::Fork(reply), order)
            }
            Ask::ForkPoint(spec, at, reply) => {
                let order = |request| fork(clone, request, spec, true, at);
                self.request(&link, Request::ForkPoint(reply), order)
            }
            Ask::WithPaused(_) => unreachable!("only code of the worker can look at its VMs"),
            Ask::Save(dir, reply) => {
                let order = |request| Order::Save {
                    clone,
                    request,
                    dir,
                };
                self.request(&link, Request::Save(reply), order)
            }
            Ask::Hold(held, reply) => {
                let order = |request| Order::Hold {
                    clone,
                    request,
                    held,
                };
                self.request(&link, Request::Hold(held, reply), order)
            }
            Ask::Fallbacks(reply) => {
                let order = |request| Order::Fallbacks { clone, request };
                self.request(&link, Request::Fallbacks(reply), order)
            }
            Ask::MemoryUse(reply) => {
                let order = |request| Order::MemoryUse { clone, request };
                self.request(&link, Request::MemoryUse(reply), order)
            }
            Ask::Input(mut bytes, reply) => {
                bytes.truncate(MOST_INPUT);
                let order = |request| Order::Input {
                    clone,
                    request,
                    bytes,
                };
                self.request(&link, Request::Input(reply), order)
            }
            Ask::Rewind(way, _, reply) => {
                let order = |request| Order::Rewind {
                    clone,
                    request,
                    way,
                };
                self.request(&link, Request::Rewind(reply), order)
            }
            Ask::Kill => link.kill(clone),
        }
    }
}

fn fork(clone: u64, request: u64, spec: CloneSpec, point_only: bool, at: Instant) -> Order {
    Order::Fork {
        clone,
        request,
        spec,
        point_only,
        at: at.into(),
    }
}

impl Way {
    /// Sends what has an answer; `false` when the clone has ended.
    fn request(&self, link: &Link, request: Request, order: impl FnOnce(u64) -> Order) -> bool {
        let number = link.number();
        {
            let mut state = link.state();
            if !state.residents.contains_key(&self.number) {
                return false;
            }
            state.requests.insert(number, (self.number, request));
        }
        match link.send(&order(number)) {
            Ok(()) => true,
            Err(error) => {
                tracing::debug!(%error, "a clone could not be asked");
                link.state().requests.remove(&number);
                false
            }
        }
    }
}

impl Resident {
    pub(super) fn watch(&self) -> Arc<Watch> {
        self.watch.clone()
    }

    pub(super) fn as_parent(&self) -> Parent {
        Parent {
            family: self.family.clone(),
            numbers: self.numbers.clone(),
            identity: self.watch.identity(),
        }
    }

    pub(super) fn console(&self) -> Arc<Console> {
        self.console.clone()
    }

    /// Its worker says how it ended, and what its disks hold.
    pub(super) fn ended(
        self,
        end: End,
        counters: Vec<BlkCounters>,
        held: &[Vec<HeldOverlay>],
        files: Result<Vec<OwnedFd>, SocketError>,
    ) {
        let taken = files
            .map_err(io::Error::other)
            .and_then(|files| disks::take_over(&self.disks, held, files));
        let (end, disks) = match taken {
            Ok(disks) => (end, disks),
            Err(error) => {
                let why = format!("it {end}, and taking over its disks failed: {error}");
                (End::Failed(why), Vec::new())
            }
        };
        self.finish(end, counters, disks);
    }

    /// Its worker has died.
    pub(super) fn died(self, death: &WorkerError) {
        self.finish(End::Failed(death.to_string()), Vec::new(), Vec::new());
    }

    fn finish(self, end: End, blk_counters: Vec<BlkCounters>, disks: Vec<Arc<dyn BlockLayer>>) {
        let Resident {
            _berth: berth,
            family,
            watch,
            member,
            console,
            disks: below,
            numbers: _,
            _image: image,
            _vsock: vsock,
        } = self;
        let panicked = console.close();
        let Some(member) = member else {
            return;
        };
        let end = match panicked {
            true => End::Failed("its console panicked".into()),
            false => end,
        };
        // Whoever waited for its end finds nothing left of it.
        drop((below, image, vsock, berth));
        family.leave(&member);
        watch.finish(Finished {
            end,
            disks,
            blk_counters,
        });
    }
}

impl Console {
    fn new(to: Box<dyn Write + Send>) -> Console {
        Console {
            writer: Mutex::new(Writer {
                to: Some(to),
                failed: false,
                panicked: false,
            }),
        }
    }

    /// Writes what the clone printed. `panicked` is called if the console, which is the embedder's
    /// code, panics; it is not written again then.
    pub(super) fn print(&self, bytes: &[u8], panicked: impl FnOnce()) {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(to) = &mut writer.to else { return };
        let write = AssertUnwindSafe(|| to.write_all(bytes).and_then(|()| to.flush()));
        match catch_unwind(write) {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                if !std::mem::replace(&mut writer.failed, true) {
                    tracing::warn!(%error, "a console cannot be written; its output is lost");
                }
            }
            Err(_panic) => {
                writer.panicked = true;
                writer.to = None;
                drop(writer);
                panicked();
            }
        }
    }

    /// Drops it; whether it has panicked.
    fn close(&self) -> bool {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let to = writer.to.take();
        let dropped = catch_unwind(AssertUnwindSafe(|| drop(to)));
        writer.panicked || dropped.is_err()
    }
}
