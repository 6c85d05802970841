//! A running VM of a family: the thread that serves it, and the handle that others hold.
//!
//! The thread owns the `forkvm_vmm::Vm`. It hears of everything through one inbox: what the vCPUs
//! tell (calls, reports, the end) and what holders of the handle ask. So requests are served one
//! after the other, and nobody else ever touches the VM.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::AtomicU32;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use forkvm_abi::{doorbell::report, errno};
use forkvm_devices::block::BlockLayer;
use forkvm_devices::device::{GuestCall, GuestOp};
use forkvm_devices::doorbell::Answer;
use forkvm_devices::virtio::blk::BlkCounters;
use forkvm_vmm::{EventSink, PauseError, PausedVm, ReadyVm, Vm, VmConfig, VmEvent};
use thiserror::Error;

use crate::disks::DiskSource;
use crate::end::End;
use crate::family::Family;
use crate::fork::{CloneSpec, ForkError, Frozen, Parent, Request, Ticket};
use crate::fork_point::ForkPoint;
use crate::identity::Identity;
use crate::limits::{Limit, LimitError};
use crate::saved::SaveError;
use crate::spawn::SpawnError;
use crate::timeline::Timeline;

/// How long the vCPUs may take to stand still when the host looks at them.
const PAUSE_DEADLINE: Duration = Duration::from_secs(5);

/// Handle of a VM. The VM runs on when all handles are dropped, until it ends or its family does.
pub struct Member {
    name: String,
    config: VmConfig,
    inbox: Sender<Message>,
    seen: Mutex<Seen>,
    changed: Condvar,
    /// The thread that serves it, until somebody has waited for its end.
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// What a VM has shown so far.
struct Seen {
    identity: Identity,
    timeline: Timeline,
    reports: Vec<(u32, Instant)>,
    finished: Option<Finished>,
    /// Called once at the end.
    when_ended: Vec<Box<dyn FnOnce() + Send>>,
}

/// What is left of a VM that has ended.
#[derive(Clone)]
pub struct Finished {
    /// How it ended.
    pub end: End,
    /// Its disks, with what it wrote to them, in the order of its configuration.
    pub disks: Vec<Arc<dyn BlockLayer>>,
    /// What each disk did in this VM.
    pub blk_counters: Vec<BlkCounters>,
}

type WithPaused = Box<dyn FnOnce(Result<&mut PausedVm<'_>, PauseError>) + Send>;

enum Message {
    Vm(VmEvent),
    Fork(CloneSpec, Instant, Sender<Result<Ticket, ForkError>>),
    ForkPoint(CloneSpec, Instant, Sender<Result<Arc<ForkPoint>, ForkError>>),
    WithPaused(WithPaused),
    Save(Sender<Result<(), SaveError>>),
    Input(Vec<u8>, Sender<usize>),
    CloneEnded,
    Kill,
}

/// Where a VM's events will go, made before the VM is.
pub(crate) struct Inbox {
    sender: Sender<Message>,
    receiver: Receiver<Message>,
}

impl Inbox {
    pub(crate) fn new() -> Inbox {
        let (sender, receiver) = channel();
        Inbox { sender, receiver }
    }

    /// For the VM's vCPU threads.
    pub(crate) fn event_sink(&self) -> EventSink {
        let sender = Mutex::new(self.sender.clone());
        Arc::new(move |event| {
            let sender = sender.lock().unwrap_or_else(PoisonError::into_inner);
            if sender.send(Message::Vm(event)).is_err() {
                tracing::trace!("an event of a VM that is being torn down");
            }
        })
    }
}

/// A VM that waits for its start, with the thread that will serve it.
///
/// The thread is there before, so that the start of many VMs is not held up by those that run
/// already. Dropped instead of started, all of it goes.
pub(crate) struct Waiting {
    family: Arc<Family>,
    member: Arc<Member>,
    vm: Option<ReadyVm>,
    /// Where the thread waits for the running VM.
    serve: Option<Sender<Vm>>,
}

impl Waiting {
    /// Of a VM whose state is in place.
    pub(crate) fn new(
        family: &Arc<Family>,
        vm: ReadyVm,
        identity: Identity,
        disks: Vec<DiskSource>,
        inbox: Inbox,
        timeline: Timeline,
    ) -> Result<Waiting, SpawnError> {
        let name = identity.name.clone();
        let member = Arc::new(Member {
            name: name.clone(),
            config: vm.config().clone(),
            inbox: inbox.sender,
            seen: Mutex::new(Seen {
                identity,
                timeline,
                reports: Vec::new(),
                finished: None,
                when_ended: Vec::new(),
            }),
            changed: Condvar::new(),
            thread: Mutex::new(None),
        });
        let (serve, started) = channel();
        let serving = {
            let (family, member) = (family.clone(), member.clone());
            move || {
                let Ok(vm) = started.recv() else { return };
                let serving = Serving {
                    family,
                    member,
                    vm,
                    disks,
                    inbox: inbox.receiver,
                    numbers: Arc::default(),
                    tickets: HashMap::new(),
                    last_ticket: 0,
                    joins: Vec::new(),
                    stopped_at: None,
                };
                serving.serve();
            }
        };
        let thread = thread::Builder::new().name(format!("vm-{name}")).spawn(serving);
        let thread =
            thread.map_err(|source| SpawnError::Host { what: "a thread to serve the VM", source })?;
        *member.thread() = Some(thread);
        Ok(Waiting { family: family.clone(), member, vm: Some(vm), serve: Some(serve) })
    }

    /// Lets it run.
    pub(crate) fn start(mut self) -> Result<Arc<Member>, SpawnError> {
        let (Some(vm), Some(serve)) = (self.vm.take(), self.serve.take()) else {
            unreachable!("both are there until the start or the drop");
        };
        self.family.enter(&self.member);
        let started = vm.start().map_err(SpawnError::from).and_then(|vm| {
            let gone = |_| io::Error::other("the thread that should serve the VM is gone");
            serve.send(vm).map_err(gone).map_err(|source| SpawnError::Host { what: "its start", source })
        });
        if let Err(error) = started {
            self.family.leave(&self.member);
            return Err(error);
        }
        Ok(self.member.clone())
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        // After a start there is nothing left to drop, and the thread has its own work.
        if let Some(serve) = self.serve.take() {
            drop((serve, self.vm.take()));
            self.member.join_thread();
        }
    }
}

impl Member {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its name, such as `X.1`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Who it is.
    pub fn identity(&self) -> Identity {
        self.seen().identity.clone()
    }

    /// What it is.
    pub fn config(&self) -> &VmConfig {
        &self.config
    }

    /// When it passed the end points of its start, as far as it has.
    pub fn timeline(&self) -> Timeline {
        self.seen().timeline
    }

    /// What the guest has reported so far, and when it was seen.
    pub fn reports(&self) -> Vec<(u32, Instant)> {
        self.seen().reports.clone()
    }

    /// Forks it. All clones run, or none and the VM runs on as before.
    pub fn fork(&self, spec: CloneSpec) -> Result<Ticket, MemberError> {
        self.ask(|reply| Message::Fork(spec, Instant::now(), reply))?.map_err(MemberError::Fork)
    }

    /// Makes a fork point without spawning a clone. The VM runs on, but with freeze `stop`.
    pub fn fork_point(&self, spec: CloneSpec) -> Result<Arc<ForkPoint>, MemberError> {
        self.ask(|reply| Message::ForkPoint(spec, Instant::now(), reply))?.map_err(MemberError::Fork)
    }

    /// Runs `look` while the VM stands still.
    pub fn with_paused<T: Send + 'static>(
        &self,
        look: impl FnOnce(&mut PausedVm<'_>) -> T + Send + 'static,
    ) -> Result<T, MemberError> {
        let answer = self.ask(|reply: Sender<Result<T, PauseError>>| {
            Message::WithPaused(Box::new(move |paused| {
                if reply.send(paused.map(look)).is_err() {
                    tracing::trace!("nobody waits for a look at the paused VM any more");
                }
            }))
        })?;
        Ok(answer?)
    }

    /// Saves it to where its family saves, and ends it ([`End::Saved`]). On an error it runs on.
    pub fn save(&self) -> Result<(), MemberError> {
        self.ask(Message::Save)?.map_err(MemberError::Save)
    }

    /// Sends bytes to its serial console; returns how many it took.
    pub fn console_input(&self, bytes: &[u8]) -> Result<usize, MemberError> {
        self.ask(|reply| Message::Input(bytes.to_vec(), reply))
    }

    /// Ends it; [`Member::wait`] returns when it is gone. Nothing happens to one that has ended.
    pub fn kill(&self) {
        if self.inbox.send(Message::Kill).is_err() {
            tracing::trace!(vm = self.name, "killed after its end");
        }
    }

    fn thread(&self) -> MutexGuard<'_, Option<JoinHandle<()>>> {
        self.thread.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until it has ended. Nothing of it is left then but what handles of it hold.
    pub fn wait(&self) -> Finished {
        let seen = self.wait_until(None, |seen| seen.finished.is_some());
        let finished = seen.finished.clone().expect("waited for it");
        drop(seen);
        self.join_thread();
        finished
    }

    /// Waits until it has ended, or until `deadline` has passed.
    pub fn wait_for(&self, deadline: Duration) -> Option<Finished> {
        let ended = |seen: &Seen| seen.finished.is_some();
        let finished = self.wait_until(Some(deadline), ended).finished.clone()?;
        self.join_thread();
        Some(finished)
    }

    /// The thread's last act is to tell the end, but until it is gone it holds the disks. Whoever
    /// comes second waits for the first.
    fn join_thread(&self) {
        let mut thread = self.thread();
        if let Some(Err(_panic)) = thread.take().map(JoinHandle::join) {
            tracing::error!(vm = self.name, "the thread that served it panicked");
        }
    }

    /// Waits until the guest has reported `value`, for the `times`th time. An error when the VM
    /// ends before, or when `deadline` passes.
    pub fn wait_report(&self, value: u32, times: usize, deadline: Duration) -> Result<(), MemberError> {
        let reported = |seen: &Seen| {
            seen.reports.iter().filter(|report| report.0 == value).count() >= times
        };
        let seen =
            self.wait_until(Some(deadline), |seen| reported(seen) || seen.finished.is_some());
        if reported(&seen) {
            return Ok(());
        }
        Err(match &seen.finished {
            Some(finished) => MemberError::Ended { name: self.name.clone(), end: finished.end.clone() },
            None => MemberError::Silent { name: self.name.clone(), value, deadline },
        })
    }

    fn wait_until(
        &self,
        deadline: Option<Duration>,
        enough: impl Fn(&Seen) -> bool,
    ) -> MutexGuard<'_, Seen> {
        let until = deadline.map(|deadline| Instant::now() + deadline);
        let mut seen = self.seen();
        while !enough(&seen) {
            seen = match until {
                None => self.changed.wait(seen).unwrap_or_else(PoisonError::into_inner),
                Some(until) => {
                    let left = until.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return seen;
                    }
                    let waited = self.changed.wait_timeout(seen, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        seen
    }

    /// Has `call` called when it ends, or now if it has.
    fn when_ended(&self, call: impl FnOnce() + Send + 'static) {
        let mut seen = self.seen();
        if seen.finished.is_none() {
            seen.when_ended.push(Box::new(call));
            return;
        }
        drop(seen);
        call();
    }

    /// Sends a message and waits for the answer of the thread that serves the VM.
    fn ask<T>(&self, message: impl FnOnce(Sender<T>) -> Message) -> Result<T, MemberError> {
        let (reply, answer) = channel();
        if self.inbox.send(message(reply)).is_ok()
            && let Ok(answer) = answer.recv()
        {
            return Ok(answer);
        }
        Err(MemberError::Ended { name: self.name.clone(), end: self.wait().end })
    }
}

/// The thread that serves a VM.
struct Serving {
    family: Arc<Family>,
    member: Arc<Member>,
    vm: Vm,
    disks: Vec<DiskSource>,
    inbox: Receiver<Message>,
    /// Clones so far; shared with the fork points, which go on counting.
    numbers: Arc<AtomicU32>,
    /// Clones of the guest's forks that it has not joined yet.
    tickets: HashMap<u32, Vec<Arc<Member>>>,
    last_ticket: u32,
    joins: Vec<Join>,
    /// Where it was stopped: this VM's own memory is that image, which is sealed once the VM is gone.
    stopped_at: Option<Arc<ForkPoint>>,
}

/// A vCPU that waits for clones.
struct Join {
    vcpu: u32,
    slot: u32,
    clones: Vec<Arc<Member>>,
}

impl Serving {
    fn serve(mut self) {
        let end = loop {
            let Ok(message) = self.inbox.recv() else {
                // The handle in `self.member` holds a sender, so this cannot be.
                break End::Failed("its inbox was closed".into());
            };
            if let Some(end) = self.handle(message) {
                break end;
            }
        };
        let span = tracing::debug_span!("end", vm = self.member.name, %end);
        let _in_span = span.enter();
        let finished = Finished {
            end,
            disks: self.disks.iter().map(DiskSource::layer).collect(),
            blk_counters: self
                .vm
                .disks()
                .iter()
                .map(|disk| disk.lock().unwrap_or_else(PoisonError::into_inner).model().counters())
                .collect(),
        };
        let Serving { family, member, vm, disks, inbox, stopped_at, .. } = self;
        // The VM goes before anybody hears of its end: who waited may count on its memory.
        drop((vm, disks, inbox));
        if let Some(point) = stopped_at
            && let Err(error) = point.image().seal()
        {
            tracing::error!(%error, "the memory of a stopped VM could not be sealed");
        }
        family.leave(&member);
        let mut seen = member.seen();
        seen.finished = Some(finished);
        let calls = std::mem::take(&mut seen.when_ended);
        drop(seen);
        member.changed.notify_all();
        calls.into_iter().for_each(|call| call());
    }

    /// Serves one message; `Some` when the VM has ended.
    fn handle(&mut self, message: Message) -> Option<End> {
        match message {
            Message::Vm(VmEvent::Report { value, at }) => self.reported(value, at),
            Message::Vm(VmEvent::Call { vcpu, call, at }) => {
                self.acted(at);
                return self.call(vcpu, call, at);
            }
            Message::Vm(VmEvent::Ended(reason)) => return Some(reason.into()),
            Message::Fork(spec, at, reply) => {
                let (forked, end) = self.fork(&spec, None, at);
                answer(reply, forked);
                return end;
            }
            Message::ForkPoint(spec, at, reply) => {
                let request = Request { spec: &spec, forker: None, at };
                let (frozen, end) = match self.freeze(&request) {
                    Ok(frozen) => {
                        let end = self.settle(&frozen);
                        (Ok(frozen.point), end)
                    }
                    Err(error) => (Err(error), None),
                };
                answer(reply, frozen);
                return end;
            }
            Message::WithPaused(look) => match self.vm.pause(PAUSE_DEADLINE) {
                Ok(mut paused) => look(Ok(&mut paused)),
                Err(error) => look(Err(error)),
            },
            Message::Save(reply) => {
                let saved = self.save();
                let end = saved.is_ok().then_some(End::Saved);
                answer(reply, saved);
                return end;
            }
            Message::Input(bytes, reply) => answer(reply, self.vm.console_input(&bytes)),
            Message::CloneEnded => self.finish_joins(),
            Message::Kill => return Some(End::Killed),
        }
        None
    }

    fn reported(&mut self, value: u32, at: Instant) {
        self.acted(at);
        let mut seen = self.member.seen();
        if value == report::ANSWER {
            seen.timeline.first_answer.get_or_insert(at);
        }
        seen.reports.push((value, at));
        drop(seen);
        self.member.changed.notify_all();
    }

    /// The guest did something that is seen outside.
    fn acted(&mut self, at: Instant) {
        let first_run = self.vm.first_run();
        let mut seen = self.member.seen();
        seen.timeline.first_run = first_run;
        seen.timeline.first_action.get_or_insert(at);
    }

    fn call(&mut self, vcpu: u32, call: GuestCall, at: Instant) -> Option<End> {
        match call.op {
            GuestOp::Fork(count) => {
                let spec = CloneSpec {
                    count,
                    accept_fewer: true,
                    ..self.family.config().guest_forks.clone()
                };
                let (forked, end) = self.fork(&spec, Some(call.slot), at);
                let result = match forked {
                    Ok(ticket) => {
                        let granted = ticket.clones.len() as u32;
                        self.tickets.insert(ticket.id, ticket.clones);
                        Answer { result: 0, granted, ticket: ticket.id }
                    }
                    Err(error) => {
                        let error_text = with_causes(&error);
                        tracing::warn!(vm = self.member.name, error_text, "a guest's fork failed");
                        Answer::of(-errno_of(&error))
                    }
                };
                if end.is_none() {
                    self.answer_call(vcpu, call.slot, result);
                }
                end
            }
            GuestOp::Join(id) => {
                match self.tickets.remove(&id) {
                    Some(clones) => self.join(vcpu, call.slot, clones),
                    None => self.answer_call(vcpu, call.slot, Answer::of(-errno::EINVAL)),
                }
                None
            }
            GuestOp::Save => match self.save() {
                Ok(()) => Some(End::Saved),
                Err(error) => {
                    let error_text = with_causes(&error);
                    tracing::warn!(vm = self.member.name, error_text, "a guest's save failed");
                    let errno = match error {
                        SaveError::NoPlace => errno::ENOSYS,
                        _ => errno::EIO,
                    };
                    self.answer_call(vcpu, call.slot, Answer::of(-errno));
                    None
                }
            },
        }
    }

    fn answer_call(&mut self, vcpu: u32, slot: u32, answer: Answer) {
        self.vm.doorbell().answer(slot, answer);
        self.vm.release(vcpu);
    }

    fn join(&mut self, vcpu: u32, slot: u32, clones: Vec<Arc<Member>>) {
        for clone in &clones {
            let inbox = self.member.inbox.clone();
            clone.when_ended(move || {
                if inbox.send(Message::CloneEnded).is_err() {
                    tracing::trace!("a clone ended after its parent");
                }
            });
        }
        self.joins.push(Join { vcpu, slot, clones });
        self.finish_joins();
    }

    /// Answers the joins whose clones have all ended.
    fn finish_joins(&mut self) {
        let worst = |join: &Join| {
            let statuses: Option<Vec<u32>> = join
                .clones
                .iter()
                .map(|clone| clone.seen().finished.as_ref().map(|finished| finished.end.status()))
                .collect();
            statuses.map(|statuses| statuses.into_iter().max().unwrap_or(0))
        };
        for join in std::mem::take(&mut self.joins) {
            match worst(&join) {
                Some(status) => {
                    self.answer_call(join.vcpu, join.slot, Answer::of(i64::from(status)));
                }
                None => self.joins.push(join),
            }
        }
    }

    fn freeze(&mut self, request: &Request<'_>) -> Result<Frozen, ForkError> {
        let identity = self.member.identity();
        let parent = Parent {
            family: &self.family,
            vm: &mut self.vm,
            disks: &mut self.disks,
            identity: &identity,
            numbers: &self.numbers,
        };
        parent.freeze(request)
    }

    /// Forks the VM. The second result is its end, if the freeze was `stop`.
    fn fork(
        &mut self,
        spec: &CloneSpec,
        forker: Option<u32>,
        at: Instant,
    ) -> (Result<Ticket, ForkError>, Option<End>) {
        let frozen = match self.freeze(&Request { spec, forker, at }) {
            Ok(frozen) => frozen,
            Err(error) => return (Err(error), None),
        };
        match frozen.point.spawn_granted(frozen.granted) {
            Ok(clones) => {
                let end = self.settle(&frozen);
                self.last_ticket += 1;
                (Ok(Ticket { id: self.last_ticket, clones, point: frozen.point }), end)
            }
            Err(error) => {
                if !frozen.parent_goes_on
                    && let Err(error) = self.vm.pause(PAUSE_DEADLINE).map(PausedVm::resume)
                {
                    tracing::error!(%error, "a parent that stands cannot be paused: a bug");
                }
                (Err(error), None)
            }
        }
    }

    /// The fork is decided: the parent learns that it was forked, or ends if it was stopped.
    fn settle(&mut self, frozen: &Frozen) -> Option<End> {
        if !frozen.parent_goes_on {
            self.stopped_at = Some(frozen.point.clone());
            return Some(End::Stopped);
        }
        let mut seen = self.member.seen();
        seen.identity.fork_count += 1;
        seen.identity.clone_id = 0;
        let announcement = seen.identity.announcement();
        drop(seen);
        if let Err(error) = self.vm.doorbell().announce(&announcement) {
            tracing::error!(%error, "a parent could not be told that it was forked");
        }
        None
    }

    fn save(&mut self) -> Result<(), SaveError> {
        let saver = self.family.config().saver.clone().ok_or(SaveError::NoPlace)?;
        let mut paused = self.vm.pause(PAUSE_DEADLINE)?;
        saver.save(&self.member.identity(), &mut paused, &self.disks)?;
        // It must not take another step: its disks would no longer be those of the saved state.
        paused.stay();
        Ok(())
    }
}

/// Whoever asked may be gone.
fn answer<T>(reply: Sender<T>, answer: T) {
    if reply.send(answer).is_err() {
        tracing::debug!("nobody waits for an answer any more");
    }
}

/// An error with its causes, on one line.
fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

fn errno_of(error: &ForkError) -> i64 {
    match error {
        ForkError::Limits(LimitError::NoClones) => errno::EINVAL,
        ForkError::Limits(LimitError::TooMany { limit: Limit::Memory, .. }) => errno::ENOMEM,
        ForkError::Limits(LimitError::TooMany { .. }) => errno::ENOSPC,
        ForkError::Pause(_) => errno::EBUSY,
        _ => errno::EIO,
    }
}

/// Why a VM could not do what it was asked.
#[derive(Debug, Error)]
pub enum MemberError {
    /// It has ended.
    #[error("VM {name} has ended: it {end}")]
    Ended {
        /// Its name.
        name: String,
        /// How.
        end: End,
    },
    /// It did not report in time.
    #[error("VM {name} did not report {value:#x} within {deadline:?}")]
    Silent {
        /// Its name.
        name: String,
        /// The report.
        value: u32,
        /// How long was waited.
        deadline: Duration,
    },
    /// It could not be paused.
    #[error(transparent)]
    Pause(#[from] PauseError),
    /// It could not be forked.
    #[error("the fork failed, and the VM runs on")]
    Fork(#[source] ForkError),
    /// It could not be saved.
    #[error("saving failed, and the VM runs on")]
    Save(#[source] SaveError),
    /// A call to the host failed.
    #[error("the host refused {what}")]
    Host {
        /// What was asked.
        what: &'static str,
        /// What it said.
        #[source]
        source: io::Error,
    },
}
