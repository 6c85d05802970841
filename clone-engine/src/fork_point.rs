//! Fork points: what clones are spawned from, now or later.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;
use std::{io, mem};

use forkvm_devices::Sections;
use forkvm_vmm::{MachineState, VmConfig};

use crate::disks::DisksAtFork;
use crate::family::Family;
use crate::fork::{ForkError, MemoryMode};
use crate::freeze::FreezeKind;
use crate::handed_out::HandedOut;
use crate::identity::Identity;
use crate::image::MemoryImage;
use crate::limits::{self, Need};
use crate::member::Member;
use crate::phase::{self, Observer, Phase};
use crate::spawn::{Prepared, SpawnError};
use crate::working_set::{Recorder, WorkingSet};

/// A VM at one instant: image, state and frozen disks. It lives as long as anybody holds it; the
/// parent may go on, or be gone.
pub struct ForkPoint {
    pub(crate) family: Arc<Family>,
    /// Who the parent was at that instant.
    pub(crate) parent: Identity,
    pub(crate) state: Arc<MachineState>,
    /// The same as sections.
    pub(crate) sections: Sections,
    pub(crate) image: Arc<MemoryImage>,
    /// Bytes of it that were populated at the freeze; clones that touch holes add to that.
    pub(crate) populated: u64,
    /// How it was made.
    pub(crate) freeze: FreezeKind,
    /// How its clones map the image while it is not whole.
    pub(crate) memory_mode: MemoryMode,
    /// What its clones touch first, if that is recorded.
    pub(crate) touches: Option<Arc<Recorder>>,
    pub(crate) disks: DisksAtFork,
    /// Doorbell slot of the guest's call that asked for it; `None` when the host asked.
    pub(crate) forker: Option<u32>,
    pub(crate) requested: Instant,
    /// What each clone is expected to write.
    pub(crate) expected_write_mib: u64,
    /// Clones that the parent ever had, of this fork point and others: they number names.
    pub(crate) numbers: Arc<AtomicU32>,
    /// Clones of this fork point.
    pub(crate) ids: AtomicU32,
    pub(crate) handed_out: HandedOut,
}

/// Clones that run, all of which are wanted or none. Dropped, they are gone before an error is told, or a
/// panic of the embedder's is heard of: with freeze `stop` the parent goes on in the memory that they map.
struct Running(Vec<Arc<Member>>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.iter().for_each(|clone| clone.kill());
        self.0.iter().for_each(|clone| drop(clone.wait()));
    }
}

impl ForkPoint {
    /// Spawns `count` clones: all of them run, or none and an error says why. Each is expected to
    /// write as much as the spec of the fork said; the host must have room for that.
    pub fn spawn(self: &Arc<Self>, count: u32) -> Result<Vec<Arc<Member>>, ForkError> {
        let asked = Instant::now();
        let spawner = self.family.config().spawner.as_ref();
        spawner.check()?;
        let shells = spawner.shells(&self.family, self.config());
        let granted = limits::grant(&self.need(shells, spawner.apart()), count, false)?;
        spawner.spawn(self, granted, asked)
    }

    /// What each clone of it takes, where `shells` wait for them, in this process or `apart`.
    pub(crate) fn need(&self, shells: u32, apart: bool) -> Need<'_> {
        let regions = self.state.layout().regions();
        Need {
            config: self.config(),
            expected_write_mib: self.expected_write_mib,
            pieces: self.image.mapped().len().max(regions.len()) as u64,
            copy_kib: 0,
            shells,
            apart,
        }
    }

    /// What one takes that is made in this process, wherever the family's clones live.
    pub(crate) fn need_here(&self) -> Need<'_> {
        self.need(self.family.pool().ready(self.config()), false)
    }

    /// As [`ForkPoint::spawn`], for clones that there was room for when they were asked for.
    pub(crate) fn spawn_granted(
        self: &Arc<Self>,
        count: u32,
    ) -> Result<Vec<Arc<Member>>, ForkError> {
        let spawner = &self.family.config().spawner;
        spawner.spawn(self, count, Instant::now())
    }

    /// Has `prepare` make `count` clones with identities of their own, and lets them run together. For
    /// spawners.
    pub(crate) fn spawn_prepared(
        self: &Arc<Self>,
        count: u32,
        prepare: impl FnOnce(Vec<Identity>, &dyn Observer) -> Result<Vec<Box<dyn Prepared>>, SpawnError>,
    ) -> Result<Vec<Arc<Member>>, ForkError> {
        self.family.check_open()?;
        let observer = self.family.config().observer.clone();
        let first = self.ids.fetch_add(count, Ordering::Relaxed) + 1;
        let identify = |clone_id| {
            let number = self.numbers.fetch_add(1, Ordering::Relaxed) + 1;
            let clone = self.parent.of_clone(number, clone_id)?;
            Ok(self.family.addressed(clone))
        };
        let identities: io::Result<Vec<_>> = (first..first + count).map(identify).collect();
        let identities = identities.map_err(ForkError::Identity)?;
        let waiting = prepare(identities, observer.as_ref())?;
        let phase = phase::begin(observer.as_ref(), Phase::Run, None)?;
        let mut running = Running(Vec::with_capacity(waiting.len()));
        for clone in waiting {
            running.0.push(clone.start()?);
        }
        phase.done();
        observer.forked(self, &running.0);
        Ok(mem::take(&mut running.0))
    }

    /// What the clones are.
    pub fn config(&self) -> &VmConfig {
        self.state.config()
    }

    /// How the parent's memory was kept; never [`FreezeKind::Auto`].
    pub fn freeze(&self) -> FreezeKind {
        self.freeze
    }

    /// How its clones map the image.
    pub fn memory_mode(&self) -> MemoryMode {
        self.memory_mode
    }

    /// The image of its memory.
    pub fn image(&self) -> &Arc<MemoryImage> {
        &self.image
    }

    /// What its clones have touched first until now, behind what was replayed from earlier fork
    /// points; empty if it is not recorded, or the image was whole.
    pub fn working_set(&self) -> WorkingSet {
        let touches = self.touches.as_ref();
        touches.map_or_else(WorkingSet::default, |touches| touches.working_set())
    }

    /// Whom it is of.
    pub fn parent(&self) -> &Identity {
        &self.parent
    }

    /// Whether the guest asked for it, rather than the host.
    pub fn by_guest(&self) -> bool {
        self.forker.is_some()
    }

    /// Clone steps from the boot to its clones.
    pub fn depth(&self) -> u32 {
        self.parent.depth + 1
    }

    /// Memory that was populated at the fork, in bytes.
    pub fn populated(&self) -> u64 {
        self.populated
    }

    /// The same in MiB, as reports have it.
    pub fn populated_mib(&self) -> f64 {
        self.populated as f64 / f64::from(1 << 20)
    }

    /// Bytes of the state of one clone, as a state file would hold it.
    pub fn state_bytes(&self) -> usize {
        self.sections
            .iter()
            .map(|section| section.kind.len() + section.body.len() + 11)
            .sum()
    }

    /// State of one clone, without memory.
    pub fn state(&self) -> &Sections {
        &self.sections
    }

    /// Has `count` shells ready for clones of this fork point, or of any of its shape, and says how
    /// many there are then. The fork's request and the spawn's find them in the family's pool, or in
    /// those of the workers that such clones would live in.
    pub fn fill_pool(&self, count: u32) -> Result<u32, SpawnError> {
        let spawner = &self.family.config().spawner;
        spawner.fill(&self.family, &self.state, count)
    }
}
