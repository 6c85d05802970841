//! The thread that serves a VM: what it is asked, by its guest and by its host.

use std::collections::HashMap;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use forkvm_abi::errno;
use forkvm_devices::device::{GuestCall, GuestOp};
use forkvm_devices::doorbell::Answer;
use forkvm_vmm::memory::PAGE;
use forkvm_vmm::{Disk, PausedVm, Vm};

use super::{Ask, Finished, Inbox, Life, Member, Message, Origin, PAUSE_DEADLINE};
use crate::accounting::VmCount;
use crate::attached::Attached;
use crate::disks::{DiskSource, DisksError};
use crate::end::End;
use crate::family::Family;
use crate::fork::{CloneSpec, ForkError, Frozen, Parent, Request, Ticket};
use crate::image::MemoryImage;
use crate::limits::LimitError;
use crate::saved::{SaveError, SaveTo};
use crate::spawn::SpawnError;
use crate::vm_memory::VmMemory;

/// The thread that serves a VM.
pub(super) struct Serving {
    pub(super) family: Arc<Family>,
    pub(super) member: Arc<Member>,
    pub(super) vm: Vm,
    pub(super) memory: Arc<VmMemory>,
    pub(super) attached: Attached,
    /// Its own, for whoever is to send something there.
    sender: Sender<Message>,
    inbox: Receiver<Message>,
    /// Messages of other lives are of the past.
    pub(super) life: Life,
    /// What a clone came of.
    pub(super) origin: Option<Origin>,
    /// The thread that takes the VM of the life before apart.
    pub(super) undertaker: Option<JoinHandle<()>>,
    /// Clones so far; shared with the fork points, which go on counting.
    numbers: Arc<AtomicU32>,
    /// The guest's forks that it has not joined yet.
    pub(super) tickets: HashMap<u32, Arc<Brood>>,
    last_ticket: u32,
    pub(super) joins: Vec<Join>,
    /// What its guest asked for and had no answer to when it was held.
    postponed: Vec<Message>,
    /// Where it was stopped: this VM's own memory is that image, which is sealed once the VM is gone.
    stopped_at: Option<Arc<MemoryImage>>,
}

/// A vCPU that waits for clones.
pub(super) struct Join {
    vcpu: u32,
    slot: u32,
    clones: Arc<Brood>,
}

/// What the parent keeps of the clones of one fork: not the clones, whose disks go with their last
/// holder, but what JOIN has to answer.
#[derive(Default)]
pub(super) struct Brood {
    left: AtomicU32,
    worst: AtomicU32,
}

impl Brood {
    /// Of `clones`; `inbox` hears when the last one has ended.
    fn watch(clones: &[Arc<Member>], inbox: &Sender<Message>) -> Arc<Brood> {
        let brood = Arc::new(Brood {
            left: AtomicU32::new(clones.len() as u32),
            ..Brood::default()
        });
        for clone in clones {
            let (brood, inbox) = (brood.clone(), inbox.clone());
            clone.when_ended(move |end| {
                brood.worst.fetch_max(end.status(), Ordering::Relaxed);
                if brood.left.fetch_sub(1, Ordering::AcqRel) == 1
                    && inbox.send(Message::ClonesEnded).is_err()
                {
                    tracing::trace!("clones ended after their parent");
                }
            });
        }
        brood
    }

    /// The worst status, once all have ended.
    fn status(&self) -> Option<u32> {
        (self.left.load(Ordering::Acquire) == 0).then(|| self.worst.load(Ordering::Relaxed))
    }
}

impl Serving {
    pub(super) fn new(
        family: Arc<Family>,
        member: Arc<Member>,
        vm: Vm,
        memory: Arc<VmMemory>,
        attached: Attached,
        inbox: Inbox,
    ) -> Serving {
        let Inbox {
            sender,
            receiver,
            life,
            origin,
            ..
        } = inbox;
        Serving {
            family,
            member,
            vm,
            memory,
            attached,
            sender,
            inbox: receiver,
            life,
            origin,
            undertaker: None,
            numbers: Arc::default(),
            tickets: HashMap::new(),
            last_ticket: 0,
            joins: Vec::new(),
            postponed: Vec::new(),
            stopped_at: None,
        }
    }

    /// Serves the VM until its end, and tells that when all of it is gone.
    pub(super) fn serve(mut self) {
        let end = loop {
            let Ok(message) = self.inbox.recv() else {
                // `self.sender` is one, so this cannot be.
                break End::Failed("its inbox was closed".into());
            };
            // Observers, consoles and savers are the embedder's code: if they panic, this VM has
            // failed, and whoever waits for it must hear so.
            match catch_unwind(AssertUnwindSafe(|| self.handle(message))) {
                Ok(None) => {}
                Ok(Some(end)) => break end,
                Err(_panic) => break End::Failed("the thread that serves it panicked".into()),
            }
        };
        let (family, member) = (self.family.clone(), self.member.clone());
        let torn_down = catch_unwind(AssertUnwindSafe(|| self.tear_down(end)));
        // A console's drop is the embedder's code too.
        member
            .watch
            .finish(torn_down.unwrap_or_else(|_panic| Finished {
                end: End::Failed("its end panicked".into()),
                disks: Vec::new(),
                blk_counters: Vec::new(),
            }));
        family.leave(&member);
    }

    /// Takes the VM apart; returns what is left of it.
    fn tear_down(mut self, end: End) -> Finished {
        let span = tracing::debug_span!("end", vm = self.member.name, %end);
        let _in_span = span.enter();
        self.join_undertaker();
        let Serving {
            vm,
            memory,
            attached,
            inbox,
            stopped_at,
            ..
        } = self;
        let Attached { disks, vsock } = attached;
        let devices = vm.disks().to_vec();
        // The VM goes before anybody hears of its end: who waited may count on its memory. And before
        // its devices are looked at: a guest can keep one of them busy until then.
        take_apart(vm, memory);
        drop(inbox);
        drop(vsock);
        for disk in &disks {
            // What the guest wrote is there, also when it did not live to flush it, and whether or
            // not anybody drops the disk before the process ends.
            if let Err(error) = disk.flush() {
                tracing::error!(%error, "a disk could not be flushed at the end of its VM");
            }
        }
        let counters = |disk: &Disk| {
            disk.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .model()
                .counters()
        };
        let finished = Finished {
            end,
            disks: disks.iter().map(DiskSource::layer).collect(),
            blk_counters: devices.iter().map(counters).collect(),
        };
        drop(devices);
        if let Some(image) = stopped_at
            && let Err(error) = image.seal()
        {
            tracing::error!(%error, "the memory of a stopped VM could not be sealed");
        }
        finished
    }

    /// Serves one message; `Some` when the VM has ended.
    fn handle(&mut self, message: Message) -> Option<End> {
        match message {
            Message::Call { life, .. }
            | Message::Ended { life, .. }
            | Message::Lost { life, .. }
                if life != self.life.number() =>
            {
                tracing::trace!(vm = self.member.name, life, "a message of an old life");
            }
            Message::Call { .. } if self.vm.is_held() => self.postponed.push(message),
            Message::Call { vcpu, call, at, .. } => return self.call(vcpu, call, at),
            Message::Ended { reason, .. } => return Some(reason.into()),
            Message::Lost { why, .. } => return Some(End::Failed(why)),
            Message::Asked(ask) => return self.asked(ask),
            Message::ClonesEnded => self.finish_joins(),
        }
        None
    }

    /// Serves what had to wait while it was held; `Some` when the VM has ended.
    fn catch_up(&mut self) -> Option<End> {
        self.finish_joins();
        let postponed = std::mem::take(&mut self.postponed);
        postponed
            .into_iter()
            .find_map(|message| self.handle(message))
    }

    /// Does what the holder of a handle asks; `Some` when the VM has ended.
    fn asked(&mut self, ask: Ask) -> Option<End> {
        match ask {
            Ask::Fork(spec, at, reply) => {
                let (forked, end) = self.fork(&spec, None, at);
                reply.give(forked);
                return end;
            }
            Ask::ForkPoint(spec, at, reply) => {
                let request = Request {
                    spec: &spec,
                    forker: None,
                    at,
                };
                let (made, end) = match self.freeze(&request) {
                    Ok(frozen) => match self.family.config().spawner.publish(&frozen.point) {
                        Ok(()) => {
                            let end = self.settle(&frozen);
                            (Ok(frozen.point), end)
                        }
                        Err(error) => {
                            self.undo(&frozen);
                            (Err(error), None)
                        }
                    },
                    Err(error) => (Err(error), None),
                };
                reply.give(made);
                return end;
            }
            Ask::WithPaused(look) => match self.vm.pause(PAUSE_DEADLINE) {
                Ok(mut paused) => look(Ok(&mut paused)),
                Err(error) => look(Err(error)),
            },
            Ask::Save(dir, reply) => {
                let saved = self.save(dir);
                let end = saved.is_ok().then_some(End::Saved);
                reply.give(saved);
                return end;
            }
            Ask::Rewind(way, asked, reply) => {
                let (rewound, end) = self.rewind(way, asked);
                reply.give(rewound);
                return end;
            }
            Ask::Hold(held, reply) => {
                reply.give(self.hold(held));
                if !self.vm.is_held() {
                    return self.catch_up();
                }
            }
            Ask::Fallbacks(reply) => reply.give(self.vm.fallback_counts()),
            Ask::MemoryUse(reply) => reply.give(VmCount::of(&self.vm)),
            Ask::Input(bytes, reply) => reply.give(self.vm.console_input(&bytes)),
            Ask::Kill => return Some(End::Killed),
        }
        None
    }

    fn call(&mut self, vcpu: u32, call: GuestCall, at: Instant) -> Option<End> {
        match call.op {
            GuestOp::Fork(count) => {
                let config = self.family.config();
                let while_shared = config.guest_forks_while_shared.as_ref();
                let shared = self.vm.ram().backing().shared().is_some();
                let spec = while_shared.filter(|_| shared);
                let spec = CloneSpec {
                    count,
                    accept_fewer: true,
                    ..spec.unwrap_or(&config.guest_forks).clone()
                };
                let (forked, end) = self.fork(&spec, Some(call.slot), at);
                let result = match forked {
                    Ok(ticket) => {
                        let granted = ticket.clones.len() as u32;
                        let brood = Brood::watch(&ticket.clones, &self.sender);
                        self.tickets.insert(ticket.id, brood);
                        Answer {
                            result: 0,
                            granted,
                            ticket: ticket.id,
                        }
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
                    Some(clones) => {
                        self.joins.push(Join {
                            vcpu,
                            slot: call.slot,
                            clones,
                        });
                        self.finish_joins();
                    }
                    None => self.answer_call(vcpu, call.slot, Answer::of(-errno::EINVAL)),
                }
                None
            }
            GuestOp::Discard { frame, pages } => {
                let start = u64::from(frame) * PAGE;
                let answer = self.give_back(start..start + u64::from(pages) * PAGE);
                self.answer_call(vcpu, call.slot, Answer::of(answer));
                None
            }
            GuestOp::Save => match self.save(None) {
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

    /// Answers the joins whose clones have all ended.
    fn finish_joins(&mut self) {
        if self.vm.is_held() {
            return;
        }
        for join in std::mem::take(&mut self.joins) {
            match join.clones.status() {
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
            memory: &self.memory,
            disks: &mut self.attached.disks,
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
                (
                    Ok(Ticket {
                        id: self.last_ticket,
                        clones,
                        point: frozen.point,
                    }),
                    end,
                )
            }
            Err(error) => {
                self.undo(&frozen);
                (Err(error), None)
            }
        }
    }

    /// Nothing came of the fork: a parent that was to stop goes on.
    fn undo(&mut self, frozen: &Frozen) {
        if !frozen.parent_goes_on
            && let Err(error) = self.vm.pause(PAUSE_DEADLINE).map(PausedVm::resume)
        {
            tracing::error!(%error, "a parent that stands cannot be paused: a bug");
        }
    }

    /// The fork is decided: the parent learns that it was forked, or ends if it was stopped.
    fn settle(&mut self, frozen: &Frozen) -> Option<End> {
        if !frozen.parent_goes_on {
            self.stopped_at = Some(frozen.point.image.clone());
            return Some(End::Stopped);
        }
        let announcement = self.member.watch.forked().announcement();
        if let Err(error) = self.vm.doorbell().announce(&announcement) {
            tracing::error!(%error, "a parent could not be told that it was forked");
        }
        None
    }

    /// Takes guest-physical memory back; how many pages that were, or a negative errno.
    fn give_back(&self, addresses: Range<u64>) -> i64 {
        let ram = self.vm.ram();
        let Some(offset) = ram.layout().offset_of(addresses.start) else {
            return -errno::EINVAL;
        };
        let part = offset..offset + (addresses.end - addresses.start);
        match self.memory.give_back(ram, self.family.faults(), &part) {
            Ok(pages) => pages as i64,
            Err(error) => {
                let error_text = with_causes(&error);
                tracing::warn!(
                    vm = self.member.name,
                    error_text,
                    "a guest's discard failed"
                );
                -errno::EIO
            }
        }
    }

    /// Saves it to `dir`, or to where its family saves.
    fn save(&mut self, dir: Option<PathBuf>) -> Result<(), SaveError> {
        let saver = match dir {
            Some(dir) => Arc::new(SaveTo::exactly(dir)),
            None => self
                .family
                .config()
                .saver
                .clone()
                .ok_or(SaveError::NoPlace)?,
        };
        let mut paused = self.vm.pause(PAUSE_DEADLINE)?;
        saver.save(&self.member.identity(), &mut paused, &self.attached.disks)?;
        // It must not take another step: its disks would no longer be those of the saved state.
        paused.stay();
        Ok(())
    }
}

/// Takes a VM apart, which has ended or will do nothing that counts.
pub(super) fn take_apart(vm: Vm, memory: Arc<VmMemory>) {
    // Images that take pages from this memory must have them before it goes.
    memory.close();
    // No thread of the VM may be held up by a page that does not come.
    vm.condemn();
    memory.abandon();
    drop(vm);
    // After the memory was closed: what watches it goes last.
    drop(memory);
}

/// An error with its causes, on one line.
pub(crate) fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ")
}

/// What a guest is told of it.
pub(crate) fn errno_of(error: &ForkError) -> i64 {
    match error {
        ForkError::Limits(LimitError::NoClones) => errno::EINVAL,
        ForkError::Limits(LimitError::TooMany { limit, .. }) if limit.is_memory() => errno::ENOMEM,
        ForkError::Limits(LimitError::TooMany { .. })
        | ForkError::Disks(DisksError::TooDeep { .. }) => errno::ENOSPC,
        ForkError::Pause(_) | ForkError::Ending(_) | ForkError::Spawn(SpawnError::Ending(_)) => {
            errno::EBUSY
        }
        ForkError::Spawn(SpawnError::Refused(refusal)) => refusal.errno,
        _ => errno::EIO,
    }
}
