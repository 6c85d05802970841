//! One userfaultfd and the thread that answers its faults, for many VMs.
//!
//! VMs are spread over a few shards, never a thread each. A shard's thread looks up whose address a
//! fault is at and hands it to that VM's [`VmMemory`]; what it calls never waits.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};

use super::counters::FaultCounters;
use crate::userfault::{Fault, Userfault, UserfaultError};
use crate::vm_memory::VmMemory;

/// See the module's text.
pub(crate) struct Shard {
    pub(crate) userfault: Userfault,
    pub(crate) counters: Arc<FaultCounters>,
    /// By first host address.
    watched: RwLock<BTreeMap<u64, Watched>>,
    /// Whose fault is being answered.
    in_hand: Mutex<Weak<VmMemory>>,
    ending: AtomicBool,
}

struct Watched {
    end: u64,
    /// File offset of RAM at the first address.
    offset: u64,
    vm: Weak<VmMemory>,
}

impl Shard {
    pub(super) fn new(counters: Arc<FaultCounters>) -> Result<Shard, UserfaultError> {
        Ok(Shard {
            userfault: Userfault::open()?,
            counters,
            watched: RwLock::default(),
            in_hand: Mutex::default(),
            ending: AtomicBool::new(false),
        })
    }

    /// Faults in `ranges` (host addresses, and the file offset of each) are `vm`'s.
    pub(crate) fn add(&self, vm: &Arc<VmMemory>, ranges: impl Iterator<Item = (Range<u64>, u64)>) {
        let mut watched = self.watched.write().unwrap_or_else(PoisonError::into_inner);
        for (range, offset) in ranges {
            let vm = Arc::downgrade(vm);
            let end = range.end;
            watched.insert(range.start, Watched { end, offset, vm });
        }
    }

    /// Takes [`add`](Self::add) back.
    pub(crate) fn remove(&self, ranges: impl Iterator<Item = Range<u64>>) {
        let mut watched = self.watched.write().unwrap_or_else(PoisonError::into_inner);
        for range in ranges {
            // The addresses may be another VM's by now.
            if watched
                .get(&range.start)
                .is_some_and(|watched| watched.vm.strong_count() == 0)
            {
                watched.remove(&range.start);
            }
        }
    }

    /// Answers faults until the end.
    pub(super) fn serve(&self) {
        while !self.ending.load(Ordering::Acquire) {
            match self.userfault.next_fault() {
                Ok(Some(fault)) => self.answer(fault),
                Ok(None) => {}
                Err(error) => {
                    // The supervisor replaces this thread.
                    tracing::error!(%error, "the fault handler cannot read its faults");
                    return;
                }
            }
        }
    }

    fn answer(&self, fault: Fault) {
        let watched = self.watched.read().unwrap_or_else(PoisonError::into_inner);
        let found = watched.range(..=fault.address).next_back();
        let vm = found.and_then(|(start, watched)| {
            let vm = watched
                .vm
                .upgrade()
                .filter(|_| fault.address < watched.end)?;
            Some((vm, watched.offset + (fault.address - start)))
        });
        drop(watched);
        match vm {
            Some((vm, offset)) => {
                *self.in_hand.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(&vm);
                vm.answer(self, offset, fault.written);
                *self.in_hand.lock().unwrap_or_else(PoisonError::into_inner) = Weak::new();
            }
            // Its VM has just gone, with all that waited.
            None => tracing::trace!(address = fault.address, "a fault of no VM"),
        }
    }

    /// The thread has died of the fault that it had in hand.
    pub(super) fn died(&self) {
        let vm = self.in_hand.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(vm) = vm.upgrade() {
            vm.handler_died();
        }
    }

    /// Has everybody who waits fault again: what a thread that died had read is not told twice.
    pub(super) fn wake_all(&self) {
        let watched = self.watched.read().unwrap_or_else(PoisonError::into_inner);
        let vms: Vec<_> = watched.values().filter_map(|w| w.vm.upgrade()).collect();
        drop(watched);
        vms.iter().for_each(|vm| vm.wake_all(self));
    }

    /// Has [`serve`](Self::serve) return once its thread is kicked.
    pub(super) fn end(&self) {
        self.ending.store(true, Ordering::Release);
    }
}
