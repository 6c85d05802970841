//! The fork itself: from a request on a running parent to clones that run.
//!
//! Runs in the thread that serves the parent, so requests are served one after the other. Up to
//! the parent's run the fork can be undone without a trace; after that, what fails takes back the
//! clones and leaves the parent running, in a private mapping and on overlays if that is where the
//! freeze put it. The vCPU that asked is held until all is decided, and then learns the outcome.

use std::io;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::{Duration, Instant};

use forkvm_devices::SectionError;
use forkvm_vmm::{MemoryError, PauseError, Vm, VmError};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::disks::{DiskSource, DisksError, FrozenDisks};
use crate::family::{Ending, Family};
use crate::first_pages::FirstPages;
use crate::fork_point::ForkPoint;
use crate::freeze::{Freeze, FreezeError, FreezeKind, ParentMemory};
use crate::handed_out::HandedOut;
use crate::identity::Identity;
use crate::image::{MemoryImage, Plan};
use crate::limits::{self, LimitError, Need};
use crate::member::Member;
use crate::phase::{self, Observer, Phase, Vetoed};
use crate::source::SourceError;
use crate::spawn::SpawnError;
use crate::vm_memory::VmMemory;
use crate::working_set::Recorder;

/// How a clone's memory hangs on the image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MemoryMode {
    /// Mapped copy-on-write from a whole image.
    #[default]
    Cow,
    /// Mapped at once, whatever the image misses: a page is fetched when it is first touched. From
    /// when the image is whole on, the same as `Cow`.
    Lazy,
}

impl MemoryMode {
    /// The word in options and outputs.
    pub fn as_str(self) -> &'static str {
        match self {
            MemoryMode::Cow => "cow",
            MemoryMode::Lazy => "lazy",
        }
    }
}

impl FromStr for MemoryMode {
    type Err = UnknownMemoryMode;

    fn from_str(word: &str) -> Result<MemoryMode, UnknownMemoryMode> {
        let modes = [MemoryMode::Cow, MemoryMode::Lazy];
        let found = modes.into_iter().find(|mode| mode.as_str() == word);
        found.ok_or_else(|| UnknownMemoryMode(word.to_owned()))
    }
}

/// Not a word for a memory mode.
#[derive(Debug, Error)]
#[error("{0:?} is no memory mode: cow and lazy are")]
pub struct UnknownMemoryMode(String);

/// What is asked of a fork.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CloneSpec {
    /// Clones, 1 or more.
    pub count: u32,
    /// How the parent's memory is kept.
    pub freeze: FreezeKind,
    /// How the clones map it.
    pub memory_mode: MemoryMode,
    /// Memory that each clone is expected to write, in MiB; counted against what the host has left.
    pub expected_write_mib: u64,
    /// Whether fewer clones than asked for will do. A guest's fork always says yes.
    pub accept_fewer: bool,
    /// How long the vCPUs may take to come to the barrier.
    pub pause_deadline: Duration,
}

impl Default for CloneSpec {
    fn default() -> CloneSpec {
        CloneSpec {
            count: 1,
            freeze: FreezeKind::Auto,
            memory_mode: MemoryMode::Cow,
            expected_write_mib: 4,
            accept_fewer: false,
            pause_deadline: Duration::from_secs(5),
        }
    }
}

impl CloneSpec {
    /// `count` clones, everything else as the engine chooses.
    pub fn new(count: u32) -> CloneSpec {
        CloneSpec {
            count,
            ..CloneSpec::default()
        }
    }
}

/// A fork that succeeded.
pub struct Ticket {
    /// Number of the fork on its parent; what the guest's JOIN takes.
    pub id: u32,
    /// The clones, in the order of their ids.
    pub clones: Vec<Arc<Member>>,
    /// Where they came from; more can be spawned from it.
    pub point: Arc<ForkPoint>,
}

/// The parent's side of a fork.
pub(crate) struct Parent<'a> {
    pub(crate) family: &'a Arc<Family>,
    pub(crate) vm: &'a mut Vm,
    pub(crate) memory: &'a Arc<VmMemory>,
    pub(crate) disks: &'a mut Vec<DiskSource>,
    pub(crate) identity: &'a Identity,
    pub(crate) numbers: &'a Arc<AtomicU32>,
}

/// A request as it came.
pub(crate) struct Request<'a> {
    pub(crate) spec: &'a CloneSpec,
    /// Doorbell slot of the guest's call; `None` when the host asks.
    pub(crate) forker: Option<u32>,
    pub(crate) at: Instant,
}

/// What a fork point left behind.
pub(crate) struct Frozen {
    pub(crate) point: Arc<ForkPoint>,
    /// Clones that there is room for.
    pub(crate) granted: u32,
    /// Whether the parent runs on; otherwise it stands at the barrier.
    pub(crate) parent_goes_on: bool,
}

impl Parent<'_> {
    /// Makes a fork point: everything up to and including the publication of the image.
    pub(crate) fn freeze(self, request: &Request<'_>) -> Result<Frozen, ForkError> {
        let observer = self.family.config().observer.clone();
        let observer = observer.as_ref();
        let faults = self.family.faults();
        let parent = ParentMemory {
            memory: self.memory,
            faults,
        };
        let mode = request.spec.memory_mode;

        let phase = phase::begin(observer, Phase::Request, None)?;
        self.family.check_open()?;
        let backing = self.vm.ram().backing();
        let lazy = || faults.shard().is_ok();
        let (freeze, why) = request.spec.freeze.choose(backing, mode, lazy)?;
        tracing::debug!(asked = %request.spec.freeze, chosen = %freeze.kind(), why, "freeze");
        let spawner = self.family.config().spawner.as_ref();
        spawner.check()?;
        let granted = grant(self.family, self.vm, request.spec, freeze)?;
        self.disks.iter().try_for_each(DiskSource::flush)?;
        let prepared = freeze.prepare(self.vm, &parent)?;
        phase.done();

        let stands_since = Instant::now();
        let phase = phase::begin(observer, Phase::Pause, None)?;
        let mut paused = self.vm.pause(request.spec.pause_deadline)?;
        if paused.has_ended() {
            return Err(ForkError::Ended);
        }
        phase.done();

        let phase = phase::begin(observer, Phase::Save, Some(&paused))?;
        let state = paused.save()?;
        phase.done();

        let phase = phase::begin(observer, Phase::Freeze, Some(&paused))?;
        let disks = FrozenDisks::freeze(paused.disks(), self.disks)?;
        let image = freeze.freeze(&mut paused, &parent, prepared)?;
        let doorbell_page = paused.doorbell().page();
        phase.done();

        let phase = match phase::begin(observer, Phase::Resume, Some(&paused)) {
            Ok(phase) => phase,
            Err(veto) => {
                freeze.thaw(&mut paused, &parent, image)?;
                return Err(veto.into());
            }
        };
        if paused.is_condemned() {
            // Some of what was saved is made up.
            freeze.thaw(&mut paused, &parent, image)?;
            return Err(ForkError::Ended);
        }
        let disks = disks.keep();
        self.family.keep_account_of(&image);
        if freeze.parent_goes_on() {
            paused.resume();
            observer.parent_paused(stands_since.elapsed());
        } else {
            paused.stay();
        }
        phase.done();

        let first_pages = FirstPages {
            state: &state,
            doorbell: doorbell_page,
        };
        let published = parent.publish(observer, freeze, &image, mode, granted, &first_pages);
        let published = published.and_then(|published| Ok((published, state.to_sections()?)));
        let ((populated, touches), sections) = match published {
            Ok(published) => published,
            Err(error) => {
                if !freeze.parent_goes_on() {
                    self.vm.pause(request.spec.pause_deadline)?.resume();
                }
                return Err(error);
            }
        };
        let point = ForkPoint {
            family: self.family.clone(),
            parent: self.identity.clone(),
            state: Arc::new(state),
            sections,
            image,
            populated,
            freeze: freeze.kind(),
            memory_mode: mode,
            touches,
            disks,
            forker: request.forker,
            requested: request.at,
            expected_write_mib: request.spec.expected_write_mib,
            numbers: self.numbers.clone(),
            ids: AtomicU32::new(0),
            handed_out: HandedOut::default(),
        };
        let parent_goes_on = freeze.parent_goes_on();
        Ok(Frozen {
            point: Arc::new(point),
            granted,
            parent_goes_on,
        })
    }
}

impl ParentMemory<'_> {
    /// Ends the making of `image`: from here on clones may map it. Returns the bytes of memory that
    /// are populated, and where first touches of the clones are recorded.
    fn publish(
        &self,
        observer: &dyn Observer,
        freeze: &dyn Freeze,
        image: &Arc<MemoryImage>,
        mode: MemoryMode,
        clones: u32,
        first_pages: &FirstPages<'_>,
    ) -> Result<(u64, Option<Arc<Recorder>>), ForkError> {
        let phase = phase::begin(observer, Phase::Publish, None)?;
        let mut touches = None;
        let below = self.memory.mapped();
        let plan = if image.is_whole() || below.is_empty() {
            Plan::whole(image.len())
        } else {
            let mut changed = image.own_pages()?;
            changed.extend(self.memory.given_back());
            changed.sort_unstable_by_key(|range| range.start);
            Plan::over(&below, &changed, image.len(), clones)
        };
        image.publish(plan)?;
        match mode {
            MemoryMode::Cow => image.complete()?,
            MemoryMode::Lazy => {
                first_pages.bring(image)?;
                if self.faults.replays() {
                    let (known, recorder) = self.memory.expect_touches();
                    self.faults.replay(image, known);
                    touches = Some(recorder);
                }
                self.faults.fill_in_background(image);
            }
        }
        image.settle();
        if freeze.parent_goes_on() {
            // A stopped parent may still map its memory shared; it is sealed when that is gone.
            image.seal()?;
        }
        phase.done();
        Ok((image.populated()?, touches))
    }
}

/// How many clones the host has room for, within what was asked.
fn grant(
    family: &Family,
    vm: &Vm,
    spec: &CloneSpec,
    freeze: &dyn Freeze,
) -> Result<u32, ForkError> {
    let copy_kib = match freeze.kind() {
        FreezeKind::Copy => {
            vm.ram()
                .populated()?
                .iter()
                .map(|range| range.end - range.start)
                .sum::<u64>()
                / 1024
        }
        _ => 0,
    };
    let spawner = &family.config().spawner;
    let need = Need {
        config: vm.config(),
        expected_write_mib: spec.expected_write_mib,
        // What a plan adds comes out of what is to spare.
        pieces: vm.ram().layout().regions().len() as u64,
        copy_kib,
        shells: spawner.shells(family, vm.config()),
        apart: spawner.apart(),
    };
    Ok(limits::grant(&need, spec.count, spec.accept_fewer)?)
}

/// Why nothing was forked. The parent runs on.
#[derive(Debug, Error)]
pub enum ForkError {
    /// The host has no room for them, or none were asked for.
    #[error(transparent)]
    Limits(#[from] LimitError),
    /// A vCPU did not stop.
    #[error("phase pause")]
    Pause(#[from] PauseError),
    /// The state could not be read.
    #[error("phase save")]
    Save(#[from] VmError),
    /// The disks could not be frozen.
    #[error("phase freeze: disks")]
    Disks(#[from] DisksError),
    /// The memory could not be frozen.
    #[error("phase freeze: memory")]
    Freeze(#[from] FreezeError),
    /// The image could not be measured or sealed.
    #[error("phase publish")]
    Image(#[from] MemoryError),
    /// Memory that the clones need from the start cannot be had.
    #[error("phase publish")]
    Source(#[from] SourceError),
    /// The state could not be encoded.
    #[error("phase publish: encoding the state")]
    State(#[from] SectionError),
    /// A clone could not be made.
    #[error("phase spawn")]
    Spawn(#[from] SpawnError),
    /// No random bytes for a clone's identity.
    #[error("phase identity")]
    Identity(#[source] io::Error),
    /// Its family is being ended.
    #[error(transparent)]
    Ending(#[from] Ending),
    /// The guest has ended its machine: there is nothing to go on with.
    #[error("the machine has just ended")]
    Ended,
    /// An observer stopped it.
    #[error(transparent)]
    Vetoed(#[from] Vetoed),
    /// Its parent lives in a worker, where it failed.
    #[error("worker {process} could not fork the clone: {why}")]
    InWorker {
        /// The worker.
        process: u32,
        /// What went wrong there.
        why: String,
    },
}
