//! The VM that is measured: the embedded guest with its job `work`, warm and halted.
//!
//! It has filled its memory and waits. Clones of it report ACTION, do the work that they were given,
//! report ANSWER and halt. Whatever is measured on it, its whole family ends with it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use forkvm_abi::doorbell::report;
use forkvm_clone_engine::accounting::FamilyUse;
use forkvm_clone_engine::{
    BootSpec, CloneSpec, ConsoleDevice, FamilyConfig, ForkPoint, FreezeKind, Member, MemoryMode,
    Observer, Phase, Timeline, Vetoed, WorkingSetPolicy,
};
use forkvm_vmm::PausedVm;

use super::measure::BenchError;
use super::setting::{Pool, Setting};
use crate::{Vm, guest};

/// Pages of a MiB.
pub const PAGES_PER_MIB: u32 = 256;

/// Far beyond what anything here takes on a slow host.
const DEADLINE: Duration = Duration::from_secs(300);

/// The five end points, in their order.
pub const END_POINTS: [&str; 5] = [
    "built",
    "restored",
    "first_run",
    "first_action",
    "first_answer",
];

/// What is booted.
#[derive(Clone, Copy, Debug)]
pub struct SubjectSpec {
    /// RAM in MiB.
    pub memory_mib: u64,
    /// vCPUs; the first one works, the others halt.
    pub vcpus: u32,
    /// Memory that it fills.
    pub populated_mib: u32,
    /// That is one page in so many of an area so many times as large; 1 for one piece.
    pub every: u32,
    /// Pages that it writes anew when it is told.
    pub dirty_pages: u32,
    /// What each clone does.
    pub work: Work,
    /// How it is forked when it asks for that itself.
    pub own_forks: (FreezeKind, MemoryMode),
    /// How the engine is set up.
    pub setting: Setting,
    /// Bytes that are brought together when a page is missing; `None` for the engine's default.
    pub chunk: Option<u64>,
    /// Whether a lazy fork point is given at once what clones of the one before touched.
    pub working_set: WorkingSetPolicy,
}

/// What a clone does before it answers.
#[derive(Clone, Copy, Debug, Default)]
pub struct Work {
    /// Pages that it reads and checks.
    pub read_pages: u32,
    /// Whether neighbours of them lie far apart.
    pub scattered: bool,
    /// Pages that it writes.
    pub write_pages: u32,
    /// How long it computes, in rounds of the guest's.
    pub rounds: u64,
    /// Whether it tells how many pages it read and wrote.
    pub tell: bool,
}

impl SubjectSpec {
    /// 512 MiB of which 64 are populated, and clones that answer after 16 pages: what figures are
    /// quoted of unless they say otherwise.
    pub const USUAL: SubjectSpec = SubjectSpec {
        memory_mib: 512,
        vcpus: 1,
        populated_mib: 64,
        every: 1,
        dirty_pages: 0,
        work: Work {
            read_pages: 16,
            scattered: false,
            write_pages: 0,
            rounds: 0,
            tell: false,
        },
        own_forks: (FreezeKind::Auto, MemoryMode::Cow),
        setting: Setting::PLAIN,
        chunk: None,
        working_set: WorkingSetPolicy::Off,
    };

    /// What its guest is told.
    pub fn cmdline(&self) -> String {
        let Work {
            read_pages,
            scattered,
            write_pages,
            rounds,
            tell,
        } = self.work;
        format!(
            "job=work mib={} every={} dirty={} read={read_pages} order={} write={write_pages} \
             rounds={rounds} tell={}",
            self.populated_mib,
            self.every,
            self.dirty_pages,
            if scattered { "scattered" } else { "linear" },
            u8::from(tell),
        )
    }
}

/// See the module's text.
pub struct Subject {
    vm: Vm,
    trace: Arc<Trace>,
    pool: Pool,
    /// Times that it was ready so far.
    ready: usize,
}

impl Subject {
    /// Boots it and waits until it is warm.
    pub fn boot(spec: &SubjectSpec) -> Result<Subject, BenchError> {
        let trace = Arc::new(Trace::default());
        let (freeze, mode) = spec.own_forks;
        let config = FamilyConfig {
            guest_forks: fork_by(freeze, mode, 1),
            ..spec
                .setting
                .family(trace.clone(), spec.chunk, spec.working_set)?
        };
        let boot = BootSpec {
            name: "bench".into(),
            memory_mib: spec.memory_mib,
            vcpus: spec.vcpus,
            disks: Vec::new(),
            payload: guest::bare(),
            cmdline: spec.cmdline(),
            console: ConsoleDevice::Serial,
        };
        let subject = Subject {
            vm: Vm::boot_with(boot, config)?,
            trace,
            pool: spec.setting.pool,
            ready: 1,
        };
        subject.vm.wait_ready(DEADLINE)?;
        Ok(subject)
    }

    /// The VM itself.
    pub fn member(&self) -> &Arc<Member> {
        self.vm.member()
    }

    /// What its family takes, by the library's own accounts.
    pub fn memory_use(&self) -> Result<FamilyUse, BenchError> {
        Ok(self.vm.family().memory_use()?)
    }

    /// Has what is set up before a clone is asked for ready for `count` of them.
    pub fn get_ready(&self, count: u32) -> Result<(), BenchError> {
        self.pool.fill(&self.vm, count)
    }

    /// What the engine did since this was asked last.
    pub fn trace(&self) -> Traced {
        self.trace.take()
    }

    /// Has it write its dirty pages once more, and waits for it.
    pub fn rewrite(&mut self) -> Result<(), BenchError> {
        self.ready += 1;
        rewrite(self.member(), self.ready)
    }

    /// Has its guest fork it into one clone. Returns the fork point and that clone, once it has answered.
    pub fn own_fork(&self) -> Result<(Arc<ForkPoint>, Arc<Member>), BenchError> {
        self.trace.await_own_fork();
        self.member().console_input(b"f")?;
        let begun = Instant::now();
        let (point, clone) = loop {
            if let Some(forked) = self.trace.take_own_fork() {
                break forked;
            }
            if begun.elapsed() > DEADLINE {
                return Err(unseen(self.member(), "its own fork"));
            }
            thread::sleep(Duration::from_millis(1));
        };
        wait_answer(&clone, 1)?;
        Ok((point, clone))
    }

    /// A fork point of it, made by `freeze` for clones in `mode`.
    pub fn point(
        &self,
        freeze: FreezeKind,
        mode: MemoryMode,
    ) -> Result<Arc<ForkPoint>, BenchError> {
        Ok(self.vm.fork_point(fork_by(freeze, mode, 1))?)
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        self.vm.family().end();
    }
}

/// A fork into `count` clones.
pub fn fork_by(freeze: FreezeKind, memory_mode: MemoryMode, count: u32) -> CloneSpec {
    CloneSpec {
        freeze,
        memory_mode,
        ..CloneSpec::new(count)
    }
}

/// Has `vm` write its dirty pages; it is ready for the `times`th time then.
pub fn rewrite(vm: &Member, times: usize) -> Result<(), BenchError> {
    vm.console_input(b"d")?;
    Ok(vm.wait_report(report::READY, times, DEADLINE)?)
}

/// Has `vm`, which has not worked yet or `times` - 1 times, do the work of a clone without a fork.
pub fn work(vm: &Member) -> Result<(), BenchError> {
    vm.console_input(b"g")?;
    Ok(())
}

/// Waits until the work of `vm` is answered for the `times`th time, and says when that was seen.
pub fn wait_answer(vm: &Member, times: usize) -> Result<Instant, BenchError> {
    vm.wait_report(report::ANSWER, times, DEADLINE)?;
    let answers = vm
        .reports()
        .into_iter()
        .filter(|(value, _)| *value == report::ANSWER);
    let answer = answers.map(|(_, at)| at).nth(times - 1);
    answer.ok_or_else(|| unseen(vm, "first_answer"))
}

/// One clone of `point`, once it has answered, and when it was asked for.
pub fn spawn_one(point: &Arc<ForkPoint>) -> Result<(Arc<Member>, Instant), BenchError> {
    let asked = Instant::now();
    let clone = point.spawn(1)?.remove(0);
    wait_answer(&clone, 1)?;
    Ok((clone, asked))
}

/// Ends clones and waits until nothing of them is left.
pub fn end(clones: &[Arc<Member>]) {
    clones.iter().for_each(|clone| clone.kill());
    clones.iter().for_each(|clone| drop(clone.wait()));
}

/// When a clone passed each end point, from `asked` on.
pub fn end_points(
    clone: &Member,
    asked: Instant,
) -> Result<[(&'static str, Duration); 5], BenchError> {
    let Timeline {
        built,
        restored,
        first_run,
        first_action,
        first_answer,
        ..
    } = clone.timeline();
    let instants = [built, restored, first_run, first_action, first_answer];
    let mut points = [("", Duration::ZERO); 5];
    for ((point, name), at) in points.iter_mut().zip(END_POINTS).zip(instants) {
        let at = at.ok_or_else(|| unseen(clone, name))?;
        *point = (name, at.saturating_duration_since(asked));
    }
    Ok(points)
}

/// When one end point was passed.
pub fn passed(
    clone: &Member,
    name: &'static str,
    at: impl Fn(&Timeline) -> Option<Instant>,
) -> Result<Instant, BenchError> {
    at(&clone.timeline()).ok_or_else(|| unseen(clone, name))
}

fn unseen(vm: &Member, end_point: &'static str) -> BenchError {
    let name = vm.name().to_owned();
    match vm.wait_for(Duration::ZERO) {
        Some(finished) => BenchError::Ended {
            name,
            end: finished.end,
        },
        None => BenchError::Unseen { name, end_point },
    }
}

/// What the engine did in one fork, or several.
#[derive(Clone, Debug, Default)]
pub struct Traced {
    /// Phases, as they ended.
    pub phases: Vec<(Phase, Duration)>,
    /// How long the parent stood still, each time.
    pub pauses: Vec<Duration>,
}

/// A fork point and its clone.
type OwnFork = (Arc<ForkPoint>, Arc<Member>);

/// Keeps what the engine did. Holds a clone only until somebody asks for it: those that were measured are to be gone.
#[derive(Default)]
pub(super) struct Trace {
    traced: Mutex<Traced>,
    own_fork: Mutex<Awaited>,
}

/// Whether a fork of the guest's own is waited for.
#[derive(Default)]
enum Awaited {
    #[default]
    Nothing,
    Fork,
    Forked(OwnFork),
}

impl Trace {
    /// What it did since this was asked last.
    pub(super) fn take(&self) -> Traced {
        std::mem::take(&mut *self.traced.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn note(&self, note: impl FnOnce(&mut Traced)) {
        note(&mut self.traced.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn own_fork(&self) -> MutexGuard<'_, Awaited> {
        self.own_fork.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn await_own_fork(&self) {
        *self.own_fork() = Awaited::Fork;
    }

    fn take_own_fork(&self) -> Option<OwnFork> {
        let mut awaited = self.own_fork();
        match std::mem::take(&mut *awaited) {
            Awaited::Forked(forked) => Some(forked),
            still => {
                *awaited = still;
                None
            }
        }
    }
}

impl Observer for Trace {
    fn enter(&self, _phase: Phase, _paused: Option<&PausedVm<'_>>) -> Result<(), Vetoed> {
        Ok(())
    }

    fn leave(&self, phase: Phase, took: Duration) {
        self.note(|traced| traced.phases.push((phase, took)));
    }

    fn parent_paused(&self, took: Duration) {
        self.note(|traced| traced.pauses.push(took));
    }

    fn forked(&self, point: &Arc<ForkPoint>, clones: &[Arc<Member>]) {
        let mut awaited = self.own_fork();
        if let (Awaited::Fork, [clone]) = (&*awaited, clones) {
            *awaited = Awaited::Forked((point.clone(), clone.clone()));
        }
    }
}
