//! A clone goes back to its fork point, in the thread that serves it.
//!
//! Until the old life is given up the rewind can fail without a trace. In place that is when the first
//! page is dropped; with a fresh shell it is when the old VM has come to stand, and by then the new one
//! is complete.

use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use forkvm_vmm::PausedVm;

use super::life::Life;
use super::seen::Watch;
use super::serving::{Serving, take_apart, with_causes};
use super::{Origin, PAUSE_DEADLINE};
use crate::disks::DiskSource;
use crate::end::End;
use crate::identity::Identity;
use crate::limits;
use crate::phase::NoObserver;
use crate::rewind::{Break, RewindError, RewindWay};
use crate::spawn::in_process::{self, Furnished, Told};
use crate::timeline::Timeline;
use crate::vm_memory::VmMemory;

/// How long the VM of the old life stays, unless the new one has acted before: taking it apart holds up
/// the page faults of the whole process.
const FIRST_STEPS: Duration = Duration::from_millis(5);

impl Serving {
    /// Rewinds it and says by which way. The second result is its end, if that failed half-way.
    pub(super) fn rewind(
        &mut self,
        way: RewindWay,
        asked: Instant,
    ) -> (Result<RewindWay, RewindError>, Option<End>) {
        let rewound = self.rewind_by(way, asked);
        let end = match &rewound {
            Err(RewindError::Broken(why)) => {
                let error_text = with_causes(why);
                tracing::error!(vm = self.member.name, error_text, "a rewind broke off");
                Some(End::Failed(format!("its rewind failed: {error_text}")))
            }
            _ => None,
        };
        (rewound, end)
    }

    fn rewind_by(&mut self, way: RewindWay, asked: Instant) -> Result<RewindWay, RewindError> {
        let origin = self.origin.clone().ok_or(RewindError::NoClone)?;
        let (chosen, why) = way.choose(self.family.kvm())?;
        tracing::debug!(vm = self.member.name, %way, %chosen, why, "rewind");
        let identity = origin.identity.reborn().map_err(RewindError::Identity)?;
        let timeline = Timeline {
            fork_requested: Some(origin.point.requested),
            spawn_requested: Some(asked),
            ..Timeline::default()
        };
        match chosen {
            RewindWay::FreshShell => self.rewind_into_shell(&origin, &identity, timeline)?,
            way => self.rewind_in_place(&origin, &identity, timeline, way)?,
        }
        Ok(chosen)
    }

    fn rewind_in_place(
        &mut self,
        origin: &Origin,
        identity: &Identity,
        timeline: Timeline,
        way: RewindWay,
    ) -> Result<(), RewindError> {
        // While it runs on: an image that it feeds must have its pages before they are dropped.
        self.memory.complete_feeds();
        let mut paused = stand(self.vm.pause(PAUSE_DEADLINE)?)?;
        let timeline = Timeline {
            built: Some(Instant::now()),
            ..timeline
        };
        let disks = origin.point.disks.for_clone();
        let put_back = PutBack {
            origin,
            memory: &self.memory,
            disks: &disks,
            life: &self.life,
            watch: &self.member.watch,
            identity,
        };
        if let Err(error) = put_back.all(&mut paused, timeline, way) {
            paused.stay();
            return Err(error.into());
        }
        paused.resume();
        self.attached.disks = disks;
        self.forget_calls();
        Ok(())
    }

    fn rewind_into_shell(
        &mut self,
        origin: &Origin,
        identity: &Identity,
        timeline: Timeline,
    ) -> Result<(), RewindError> {
        // At most two VMs at a time: who rewinds faster than a VM is taken apart waits here.
        self.join_undertaker();
        // The other VM is made here, wherever this family's clones live.
        let room = limits::grant(&origin.point.need_here(), 1, false);
        room.map_err(|error| RewindError::Room(Box::new(error.into())))?;
        let life = self.life.next();
        let told = Told {
            identity,
            granted: origin.granted,
            life: &life,
            vsock: self.attached.vsock.clone(),
        };
        let furnished = in_process::furnish(&origin.point, &told, timeline, &NoObserver)?;
        stand(self.vm.pause(PAUSE_DEADLINE)?)?.stay();

        let Furnished {
            vm,
            memory,
            attached,
            timeline,
            thread,
        } = furnished;
        self.life = life;
        self.member
            .watch
            .begin_life(self.life.number(), identity.clone(), timeline);
        self.forget_calls();
        let vm = if self.vm.is_held() {
            vm.start_held()
        } else {
            vm.start()
        };
        let old_vm = std::mem::replace(&mut self.vm, vm);
        let old_memory = std::mem::replace(&mut self.memory, memory);
        let old_disks = std::mem::replace(&mut self.attached, attached).disks;
        let (watch, life) = (self.member.watch.clone(), self.life.number());
        let undertaker = thread.begin("undertaker", move || {
            drop(watch.wait_until(Some(FIRST_STEPS), |seen| seen.has_acted_in(life)));
            take_apart(old_vm, old_memory);
            drop(old_disks);
        });
        self.undertaker = Some(undertaker);
        Ok(())
    }

    /// What the old life asked for is not answered in the new one. Clones that it made run on.
    fn forget_calls(&mut self) {
        self.tickets.clear();
        self.joins.clear();
    }

    /// Waits until the VM of the life before is gone.
    pub(super) fn join_undertaker(&mut self) {
        if let Some(Err(_panic)) = self.undertaker.take().map(JoinHandle::join) {
            tracing::error!(vm = self.member.name, "taking its old VM apart panicked");
        }
    }
}

/// The VM stands, and there is something to go back with.
fn stand(paused: PausedVm<'_>) -> Result<PausedVm<'_>, RewindError> {
    if paused.has_ended() || paused.is_condemned() {
        return Err(RewindError::Ended);
    }
    Ok(paused)
}

/// What is put back into the same VM, all or nothing of it.
struct PutBack<'a> {
    origin: &'a Origin,
    memory: &'a VmMemory,
    disks: &'a [DiskSource],
    life: &'a Life,
    watch: &'a Watch,
    identity: &'a Identity,
}

impl PutBack<'_> {
    fn all(
        &self,
        paused: &mut PausedVm<'_>,
        timeline: Timeline,
        way: RewindWay,
    ) -> Result<(), Break> {
        let Origin { point, granted, .. } = self.origin;
        if way == RewindWay::SlotReadd {
            paused.readd_slots()?;
        }
        self.memory.rewind(paused.ram())?;
        let layers: Vec<_> = self.disks.iter().map(DiskSource::layer).collect();
        paused.rewind(&point.state, &layers)?;
        // The threads have told all that they had to of the old life.
        self.life.go_on();
        let timeline = Timeline {
            restored: Some(Instant::now()),
            ..timeline
        };
        let number = self.life.number();
        self.watch
            .begin_life(number, self.identity.clone(), timeline);
        in_process::tell(
            &mut paused.doorbell(),
            self.identity,
            point.forker,
            *granted,
        )?;
        // Last: what was lost before the life went on is not told in this one.
        if paused.is_condemned() {
            return Err(Break::Condemned);
        }
        Ok(())
    }
}
