//! A family of guests that do with their memory as they are told, on sources that do so as well.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use forkvm::engine::{Member, Ticket, WorkingSetPolicy};
use forkvm::vmm::PausedVm;
use forkvm::{CloneSpec, End, FaultConfig, FreezeKind, MemoryMode};
use vm_memory::{Bytes, GuestAddress};

use crate::common::switch::{Manner, Switch};
use crate::common::{Guest, LONG, Obedient, Setup, fork_by, scaled};

pub(crate) const PAGE: u64 = 4096;

/// What page 0 holds at first; page i holds that and i.
pub(crate) const FIRST: u64 = 0x5eed_0000_0000;

/// How long past its deadline an answer may take to have its consequence.
pub(crate) const SOON: Duration = Duration::from_secs(1);

/// Pages of the guests' memory that are looked at.
pub(crate) fn pages() -> u64 {
    u64::from(scaled(128, 24))
}

/// Freezes that give clones whose memory comes from a parent that runs.
pub(crate) const LIVE: [FreezeKind; 2] = [FreezeKind::WriteProtect, FreezeKind::Delta];

/// The origin, and what its images take their pages from.
pub(crate) struct Origin {
    pub(crate) vm: Guest,
    pub(crate) switch: Switch,
    /// File offset in RAM of the first page that is looked at.
    area: u64,
}

impl Origin {
    /// Whose sources may be silent for `deadline`. Pages are fetched one by one, and by nothing but
    /// their first touch. Forks by `freeze` find all pages in the parent, none in an earlier image.
    pub(crate) fn new(freeze: FreezeKind, deadline: Duration) -> Origin {
        Origin::with(plain(), freeze, faults(deadline))
    }

    /// The same, but that clones are given what those of an earlier fork touched.
    pub(crate) fn replaying(freeze: FreezeKind, deadline: Duration) -> Origin {
        let faults = FaultConfig {
            working_set: WorkingSetPolicy::RecordAndReplay,
            ..faults(deadline)
        };
        Origin::with(plain(), freeze, faults)
    }

    /// In this process, with its clones, whose images are filled in the background.
    pub(crate) fn filled_here(freeze: FreezeKind) -> Origin {
        let faults = FaultConfig {
            background: Some(1000),
            ..faults(LONG)
        };
        Origin::with(plain().here(), freeze, faults)
    }

    fn with(setup: Setup, freeze: FreezeKind, faults: FaultConfig) -> Origin {
        let switch = Switch::new();
        let vm = setup.faults(faults).sources(switch.clone()).boot();
        vm.wait_ready(LONG).unwrap();
        if freeze == FreezeKind::Delta {
            vm.fork_point(fork_by(FreezeKind::Remap, MemoryMode::Cow, 1))
                .unwrap();
        }
        let mut parent = Obedient::new(&vm, vm.member());
        parent.write(0, FIRST, pages());
        let area = vm
            .member()
            .with_paused(|paused| find(paused, FIRST))
            .unwrap();
        Origin { vm, switch, area }
    }

    /// Where page `number` stands in the file of the RAM.
    pub(crate) fn page(&self, number: u64) -> Range<u64> {
        let offset = self.area + number * PAGE;
        offset..offset + PAGE
    }

    pub(crate) fn parent(&self) -> Obedient<'_> {
        Obedient::new(&self.vm, self.vm.member())
    }

    pub(crate) fn clone_of(&self, ticket: &Ticket, number: usize) -> Obedient<'_> {
        let mut clone = Obedient::new(&self.vm, &ticket.clones[number]);
        // The code that it obeys with is there from now on.
        clone.write(0, FIRST, 1);
        clone.expect(0, FIRST, 1);
        clone
    }

    /// Forks `member` lazily.
    pub(crate) fn fork(&self, member: &Member, freeze: FreezeKind, count: u32) -> Ticket {
        member
            .fork(fork_by(freeze, MemoryMode::Lazy, count))
            .unwrap()
    }

    /// The parent goes on, and its next clones have all that it holds.
    pub(crate) fn expect_unharmed(&self, freeze: FreezeKind, value: u64) {
        self.switch.set_all(Manner::Near);
        let mut parent = self.parent();
        parent.expect(0, value, pages());
        let ticket = self.fork(self.vm.member(), freeze, 1);
        parent.write(0, 1, pages());
        let mut clone = Obedient::new(&self.vm, &ticket.clones[0]);
        clone.expect(0, value, pages());
        parent.expect(0, 1, pages());
    }
}

/// What obeys.
fn plain() -> Setup {
    Setup::new(format!("job=obey pages={}", pages())).memory_mib(32)
}

/// Pages come one by one, and by nothing but their first touch.
fn faults(deadline: Duration) -> FaultConfig {
    FaultConfig {
        chunk: PAGE,
        readahead: 0,
        working_set: WorkingSetPolicy::Off,
        background: None,
        page_deadline: deadline,
        ..FaultConfig::default()
    }
}

/// Finds the page that holds `value` in all places that the guest writes.
fn find(paused: &mut PausedVm<'_>, value: u64) -> u64 {
    let ram = paused.ram();
    let word = |offset: u64| -> u64 { ram.guest().read_obj(GuestAddress(offset)).unwrap() };
    let populated = ram.populated().unwrap();
    let mut pages = populated
        .into_iter()
        .flat_map(|run| run.step_by(PAGE as usize));
    let holds = |page: &u64| [0, 2048, 4088].iter().all(|at| word(page + at) == value);
    pages.find(holds).unwrap()
}

/// `member` ends by `until` with a reason that has `why` in it.
pub(crate) fn expect_lost(member: &Member, until: Instant, why: &str) {
    let finished = member.wait_for(until.saturating_duration_since(Instant::now()));
    let Some(finished) = finished else {
        panic!("{} runs on without its page", member.name());
    };
    match finished.end {
        End::Failed(reason) if reason.contains(why) => {}
        end => panic!("{} {end}", member.name()),
    }
}

/// A spec with a pause that is not waited for long.
pub(crate) fn impatient(freeze: FreezeKind, pause_deadline: Duration) -> CloneSpec {
    CloneSpec {
        pause_deadline,
        ..fork_by(freeze, MemoryMode::Lazy, 1)
    }
}

/// All that a fork made.
pub(crate) fn members(ticket: &Ticket) -> &[Arc<Member>] {
    &ticket.clones
}
