//! Serves the page faults of lazy memory: a few threads for all VMs of a family.
//!
//! Where a page fault goes: `shard` reads it, `VmMemory` knows what is mapped or protected
//! there, [`MemoryImage`] brings the page, from a
//! [`PageSource`] at hand or by way of `fetcher`.
//!
//! It cannot hang a clone. Fault threads never wait for a source. The userfaultfds belong to the
//! supervisor: a fault thread that dies is replaced, and everybody who waits is woken to fault again.
//! A far source has a deadline. Called by forks and restores; started with the first of them that
//! needs it.

mod copier;
pub(crate) mod counters;
pub(crate) mod fetcher;
pub(crate) mod readahead;
pub(crate) mod shard;

use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use forkvm_vmm::kick::{self, Kick};
use forkvm_vmm::memory::PAGE;
use serde::{Deserialize, Serialize};

use crate::image::{Arriving, EmptyImage, MemoryImage, OutlineError, OwnerTable, StoreError};
use crate::source::{PageSource, PlainSources, Sources};
use crate::userfault::UserfaultError;
use crate::vm_memory::VmMemory;
use crate::working_set::{WorkingSet, WorkingSetPolicy};

use copier::Copier;
use counters::FaultCounters;
pub use counters::FaultFigures;
use readahead::Readahead;
use shard::Shard;

/// How lazy memory is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultConfig {
    /// Bytes that are brought together when a page is missing: 4 KiB to 2 MiB, a power of two.
    pub chunk: u64,
    /// Most bytes that are brought ahead of a VM that touches its memory in order; 0 for none.
    pub readahead: u64,
    /// Whether the next clones are given at once what the first ones touched.
    pub working_set: WorkingSetPolicy,
    /// Threads that answer faults, 1 or more.
    pub shards: usize,
    /// MiB a second that incomplete images are filled with in the background; `None` leaves them to
    /// what clones touch.
    pub background: Option<u32>,
    /// How long a source that is not in this process's memory may be silent about pages that it was
    /// asked for. Then it counts as gone.
    pub page_deadline: Duration,
}

impl Default for FaultConfig {
    fn default() -> FaultConfig {
        let cpus = thread::available_parallelism().map_or(1, NonZeroUsize::get);
        FaultConfig {
            chunk: 64 << 10,
            readahead: 1 << 20,
            working_set: WorkingSetPolicy::default(),
            shards: cpus.min(8),
            background: Some(256),
            page_deadline: Duration::from_secs(5),
        }
    }
}

impl FaultConfig {
    /// Whether pages can be served like this.
    pub(crate) fn is_sound(&self) -> bool {
        self.chunk.is_power_of_two() && (PAGE..=2 << 20).contains(&self.chunk)
    }

    /// What one VM will touch next.
    pub(crate) fn readahead(&self) -> Readahead {
        Readahead::new(self.chunk, self.readahead)
    }
}

/// What the supervisor is told.
pub(crate) enum Notice {
    /// An image fills from now on.
    Filling(Weak<MemoryImage>),
    /// The last page of a kind has come into one of them.
    LastPage,
    /// An image takes nothing more from this VM.
    Fed(Arc<VmMemory>),
    /// The thread of this shard has ended.
    HandlerEnded(usize),
    /// The family is gone.
    End,
}

/// See the module's text. Dropped with its family, when no VM is left.
pub struct FaultHandler {
    config: FaultConfig,
    sources: Arc<dyn Sources>,
    counters: Arc<FaultCounters>,
    notices: Sender<Notice>,
    running: Mutex<Running>,
    next_shard: AtomicUsize,
    copier: Copier,
}

enum Running {
    NotYet(Option<Receiver<Notice>>),
    Yes {
        shards: Vec<Arc<Shard>>,
        supervisor: Option<JoinHandle<()>>,
    },
}

impl FaultHandler {
    pub(crate) fn new(config: FaultConfig, sources: Option<Arc<dyn Sources>>) -> FaultHandler {
        let (notices, receiver) = channel();
        FaultHandler {
            config,
            sources: sources.unwrap_or_else(|| Arc::new(PlainSources)),
            counters: Arc::new(FaultCounters::new()),
            notices,
            running: Mutex::new(Running::NotYet(Some(receiver))),
            next_shard: AtomicUsize::new(0),
            copier: Copier::new(config.background),
        }
    }

    /// What was done so far.
    pub fn figures(&self) -> FaultFigures {
        self.counters.figures()
    }

    /// What one VM will touch next.
    pub(crate) fn readahead(&self) -> Readahead {
        self.config.readahead()
    }

    pub(crate) fn notices(&self) -> Sender<Notice> {
        self.notices.clone()
    }

    /// A userfaultfd, and the thread behind it, for one more VM.
    pub(crate) fn shard(&self) -> Result<Arc<Shard>, UserfaultError> {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if let Running::NotYet(receiver) = &mut *running {
            let shards = (0..self.config.shards.max(1))
                .map(|_| Ok(Arc::new(Shard::new(self.counters.clone())?)))
                .collect::<Result<Vec<_>, UserfaultError>>()?;
            let failed = |source| UserfaultError::Call {
                call: "starting the fault handler",
                source,
            };
            kick::prepare_signal().map_err(failed)?;
            let receiver = receiver
                .take()
                .ok_or_else(|| failed(std::io::Error::other("an earlier attempt has failed")))?;
            let supervisor = Supervisor {
                shards: shards.clone(),
                threads: Vec::new(),
                notices: self.notices.clone(),
                filling: Vec::new(),
            };
            let supervisor = thread::Builder::new()
                .name("fault-super".into())
                .spawn(move || supervisor.run(&receiver))
                .map_err(failed)?;
            *running = Running::Yes {
                shards,
                supervisor: Some(supervisor),
            };
        }
        let Running::Yes { shards, .. } = &*running else {
            unreachable!("started above");
        };
        let next = self.next_shard.fetch_add(1, Ordering::Relaxed);
        Ok(shards[next % shards.len()].clone())
    }

    /// An image for `len` bytes that will fill from its source, and fails now if none can.
    pub(crate) fn empty_image(&self, len: u64) -> Result<EmptyImage, StoreError> {
        // The supervisor looks after it.
        self.shard()?;
        let (counters, notices) = (self.counters.clone(), self.notices.clone());
        EmptyImage::new(len, self.config, counters, notices)
    }

    /// Copies of the descriptors of all userfaultfds that watch VMs of this family.
    pub(crate) fn duplicates(&self) -> Result<Vec<OwnedFd>, UserfaultError> {
        self.shard()?;
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let Running::Yes { shards, .. } = &*running else {
            unreachable!("started above");
        };
        let duplicates = shards.iter().map(|shard| shard.userfault.duplicate());
        duplicates.collect()
    }

    /// An image that another process fills; `source` is the way there. Published.
    pub(crate) fn image_elsewhere(
        &self,
        arriving: Arriving,
        source: Arc<dyn PageSource>,
    ) -> Result<Arc<MemoryImage>, OutlineError> {
        // The supervisor looks after it.
        self.shard().map_err(OutlineError::Unwatched)?;
        let Arriving {
            name,
            file,
            table,
            plan,
            config,
        } = arriving;
        let (counters, notices) = (self.counters.clone(), self.notices.clone());
        let empty = EmptyImage::elsewhere(name, file, table.len(), config, counters, notices);
        let image = MemoryImage::filling(empty, table, self.source(source));
        // Before anybody looks whether it is whole.
        image.publish(plan)?;
        self.look_after(&image);
        Ok(image)
    }

    /// What an image of this family takes its pages from, where they come from `source`.
    pub(crate) fn source(&self, source: Arc<dyn PageSource>) -> Arc<dyn PageSource> {
        self.sources.of_image(source)
    }

    /// An image that fills from `source`, without a VM that feeds it.
    pub(crate) fn image_of(
        &self,
        empty: EmptyImage,
        table: OwnerTable,
        source: Arc<dyn PageSource>,
    ) -> Arc<MemoryImage> {
        let image = MemoryImage::filling(empty, table, self.source(source));
        self.look_after(&image);
        image
    }

    /// Looks after an image until it is whole: deadlines, what follows from its last page, and
    /// filling it in the background.
    pub(crate) fn look_after(&self, image: &Arc<MemoryImage>) {
        if image.is_whole() {
            return;
        }
        self.tell(Notice::Filling(Arc::downgrade(image)));
    }

    /// Fills a published image in the background, if the family has it so.
    pub(crate) fn fill_in_background(&self, image: &Arc<MemoryImage>) {
        if self.config.background.is_some() && !image.is_whole() {
            self.copier.add(image);
        }
    }

    /// Whether first touches are recorded and replayed.
    pub(crate) fn replays(&self) -> bool {
        self.config.working_set == WorkingSetPolicy::RecordAndReplay
    }

    /// Brings what is missing of `set` into a published image, while its clones start.
    pub(crate) fn replay(&self, image: &Arc<MemoryImage>, set: WorkingSet) {
        if !set.is_empty() && !image.is_whole() {
            self.copier.replay(image, set);
        }
    }

    fn tell(&self, notice: Notice) {
        if self.notices.send(notice).is_err() {
            tracing::error!("the supervisor of page faults has ended");
        }
    }
}

impl Drop for FaultHandler {
    fn drop(&mut self) {
        // First: it may wait for a source, and it is the supervisor that looks at deadlines.
        self.copier.end();
        let running = self
            .running
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        if let Running::Yes { supervisor, .. } = running {
            let supervisor = supervisor.take();
            self.tell(Notice::End);
            if let Some(Err(_panic)) = supervisor.map(JoinHandle::join) {
                tracing::error!("the supervisor of page faults panicked");
            }
        }
    }
}

/// How often deadlines are looked at while an image fills.
const DEADLINE_TICK: Duration = Duration::from_millis(100);

/// How long a fault thread may take to end before it is kicked again.
const KICK_AGAIN: Duration = Duration::from_millis(5);

type HandlerThread = (JoinHandle<()>, Option<Kick>);

struct Supervisor {
    shards: Vec<Arc<Shard>>,
    /// One a shard; `None` where none could be had yet.
    threads: Vec<Option<HandlerThread>>,
    notices: Sender<Notice>,
    filling: Vec<Weak<MemoryImage>>,
}

impl Supervisor {
    fn run(mut self, notices: &Receiver<Notice>) {
        self.threads = (0..self.shards.len())
            .map(|index| self.start(index))
            .collect();
        let mut looked_at = Instant::now();
        loop {
            let at_rest = self.filling.is_empty() && self.threads.iter().all(Option::is_some);
            let notice = if at_rest {
                notices.recv().map_err(|_| RecvTimeoutError::Disconnected)
            } else {
                notices.recv_timeout(DEADLINE_TICK)
            };
            match notice {
                Ok(Notice::Filling(image)) => self.filling.push(image),
                Ok(Notice::LastPage) => self.each_filling(|image| image.settle()),
                Ok(Notice::Fed(vm)) => vm.relax(),
                Ok(Notice::HandlerEnded(index)) => self.replace(index),
                Ok(Notice::End) | Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {}
            }
            // Not only when it is quiet: a busy family's notices may follow each other for ever.
            if looked_at.elapsed() >= DEADLINE_TICK {
                looked_at = Instant::now();
                self.each_filling(|image| image.check_deadline());
                self.start_missing();
            }
        }
        for shard in &self.shards {
            shard.end();
        }
        for (thread, kick) in self.threads.into_iter().flatten() {
            while !thread.is_finished() {
                if let Some(kick) = &kick {
                    kick.kick();
                }
                thread::sleep(KICK_AGAIN);
            }
            if thread.join().is_err() {
                tracing::error!("a fault thread panicked at its end");
            }
        }
    }

    /// Those that are whole or gone need no more looking after.
    fn each_filling(&mut self, each: impl Fn(&Arc<MemoryImage>)) {
        self.filling.retain(|image| {
            image.upgrade().is_some_and(|image| {
                each(&image);
                let whole = image.is_whole();
                if whole {
                    image.settle();
                }
                !whole
            })
        });
    }

    /// A host that is short of threads may have one later.
    fn start_missing(&mut self) {
        for index in 0..self.threads.len() {
            if self.threads[index].is_none() {
                self.threads[index] = self.start(index);
                self.shards[index].wake_all();
            }
        }
    }

    fn start(&self, index: usize) -> Option<HandlerThread> {
        let (shard, notices) = (self.shards[index].clone(), self.notices.clone());
        let (tell, told) = channel();
        let serve = move || {
            kick::allow_kicks();
            if tell.send(Kick::of_this_thread()).is_err() {
                return;
            }
            if catch_unwind(AssertUnwindSafe(|| shard.serve())).is_err() {
                tracing::error!("a fault thread panicked and is replaced");
            }
            if notices.send(Notice::HandlerEnded(index)).is_err() {
                tracing::trace!("a fault thread ends with its supervisor");
            }
        };
        let name = format!("fault{index}");
        match thread::Builder::new().name(name).spawn(serve) {
            Ok(thread) => Some((thread, told.recv().ok())),
            Err(error) => {
                tracing::error!(%error, "no thread to answer page faults");
                None
            }
        }
    }

    /// A fault thread has ended before its time.
    fn replace(&mut self, index: usize) {
        let next = self.start(index);
        let ended = std::mem::replace(&mut self.threads[index], next);
        if let Some(Err(_panic)) = ended.map(|(thread, _kick)| thread.join()) {
            tracing::error!("a fault thread panicked outside of its service");
        }
        self.shards[index].died();
        self.shards[index].wake_all();
    }
}
