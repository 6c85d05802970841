//! What a worker has of one family of the engine's: a family of its own with the clones that live here,
//! and what the engine said of each of them.

use std::cell::Cell;
use std::collections::HashMap;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use forkvm_vmm::{Kvm, PausedVm};

use super::Engine;
use super::console::Console;
use super::forks::{Answers, ForkPhases, Forks};
use crate::disks::DiskSource;
use crate::family::{Consoles, Family, FamilyConfig};
use crate::fault::FaultConfig;
use crate::fork::CloneSpec;
use crate::identity::Identity;
use crate::page_link::PageLink;
use crate::phase::Observer;
use crate::pool::PoolConfig;
use crate::saved::{SaveError, SaveTo, Saver};

/// See the module's text.
pub(super) struct Home {
    pub(super) family: Arc<Family>,
    pub(super) places: Arc<Places>,
    /// Whether the engine has copies of its userfaultfds.
    pub(super) watched: Cell<bool>,
}

/// How a family is kept here.
pub(super) struct Settled {
    pub(super) faults: FaultConfig,
    pub(super) pool: PoolConfig,
    pub(super) guest_forks: CloneSpec,
    /// Who watches forks of its clones.
    pub(super) observer: Arc<dyn Observer>,
}

impl Home {
    pub(super) fn new(
        kvm: &Arc<Kvm>,
        engine: &Arc<Engine>,
        pages: &Arc<PageLink>,
        answers: &Arc<Answers>,
        settled: Settled,
    ) -> Home {
        let Settled {
            faults,
            pool,
            guest_forks,
            observer,
        } = settled;
        let places = Arc::new(Places::default());
        let forks = Forks {
            engine: engine.clone(),
            pages: pages.clone(),
            places: places.clone(),
            answers: answers.clone(),
        };
        let config = FamilyConfig {
            consoles: places.clone(),
            observer: Arc::new(ForkPhases(observer)),
            spawner: Arc::new(forks),
            guest_forks,
            pool,
            faults,
            saver: Some(places.clone()),
            ..FamilyConfig::default()
        };
        Home {
            family: Family::new(kvm.clone(), config),
            places,
            watched: Cell::new(false),
        }
    }
}

/// Where the clones of one family print and are saved to, by their names.
#[derive(Default)]
pub(super) struct Places(Mutex<HashMap<String, Place>>);

struct Place {
    number: u64,
    console: Arc<Console>,
    /// `None` where clones of this family are not saved.
    save_to: Option<PathBuf>,
}

/// The place of a clone, as long as this is there.
pub(super) struct Entry {
    places: Arc<Places>,
    clone: String,
}

impl Places {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Place>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The clone `identity` goes by `number`, prints to `console`, and is saved to where [`SaveTo`] of
    /// `save_to` puts it.
    pub(super) fn add(
        self: &Arc<Self>,
        identity: &Identity,
        number: u64,
        console: Arc<Console>,
        save_to: Option<PathBuf>,
    ) -> Entry {
        let clone = identity.name.clone();
        let place = Place {
            number,
            console,
            save_to,
        };
        self.lock().insert(clone.clone(), place);
        Entry {
            places: self.clone(),
            clone,
        }
    }

    /// What the engine calls a clone.
    pub(super) fn number_of(&self, identity: &Identity) -> Option<u64> {
        let places = self.lock();
        places.get(&identity.name).map(|place| place.number)
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.places.lock().remove(&self.clone);
    }
}

impl Consoles for Places {
    fn open(&self, vm: &Identity) -> io::Result<Box<dyn Write + Send>> {
        let places = self.lock();
        let place = places.get(&vm.name);
        let place = place.ok_or_else(|| io::Error::other("the engine knows no such clone"))?;
        Ok(Console::writer(&place.console))
    }
}

impl Saver for Places {
    fn save(
        &self,
        identity: &Identity,
        vm: &mut PausedVm<'_>,
        disks: &[DiskSource],
    ) -> Result<(), SaveError> {
        let places = self.lock();
        let place = places.get(&identity.name);
        let dir = place.and_then(|place| place.save_to.clone());
        drop(places);
        SaveTo::new(dir.ok_or(SaveError::NoPlace)?).save(identity, vm, disks)
    }
}
