//! Shells that wait in a worker, as far as the engine knows.
//!
//! The worker says how many are left when it has filled its pool and with each clone that it has prepared.
//! Those that it has built anew since then are not known yet: a fork is granted too little rather than too
//! much.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use forkvm_vmm::VmConfig;

use crate::family::Family;

/// See the module's text.
#[derive(Default)]
pub(super) struct Shells(Mutex<HashMap<Kind, u32>>);

/// What machines they are for.
#[derive(PartialEq, Eq, Hash)]
struct Kind {
    family: u64,
    memory_mib: u64,
    vcpus: u32,
}

impl Kind {
    fn of(family: &Family, config: &VmConfig) -> Kind {
        Kind {
            family: family.handed_out.number(),
            memory_mib: config.memory_mib,
            vcpus: config.vcpus,
        }
    }
}

impl Shells {
    fn lock(&self) -> MutexGuard<'_, HashMap<Kind, u32>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// So many are left for clones of `family` like `config`.
    pub(super) fn note(&self, family: &Family, config: &VmConfig, left: u32) {
        self.lock().insert(Kind::of(family, config), left);
    }

    pub(super) fn left(&self, family: &Family, config: &VmConfig) -> u32 {
        let left = self.lock();
        left.get(&Kind::of(family, config)).copied().unwrap_or(0)
    }

    /// Those of a family go with it.
    pub(super) fn forget(&self, family: u64) {
        self.lock().retain(|kind, _| kind.family != family);
    }
}
