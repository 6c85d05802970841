//! One userfaultfd and the thread that answers its faults, for many VMs.
//!
//! VMs are spread over a few shards, never a thread each. A shard's thread looks up whose address a
//! fault is at and hands it to that VM's [`VmMemory`]; what it calls never waits. While no fault
//! waits it brings pages ahead of VMs that touch theirs in order, a chunk between two looks.

use std::collections::{BTreeMap, VecDeque};
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
    /// Who is being served.
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
        // The supervisor replaces a thread that returns.
        if let Err(error) = self.serve_until_the_end() {
            tracing::error!(%error, "the fault handler cannot read its faults");
        }
    }

    fn serve_until_the_end(&self) -> Result<(), UserfaultError> {
        // VMs that read on, each with something left to bring ahead.
        let mut reading: VecDeque<Weak<VmMemory>> = VecDeque::new();
        // A thread that died may have left it otherwise.
        self.userfault.set_blocking(true)?;
        while !self.ending.load(Ordering::Acquire) {
            let idle = reading.is_empty();
            match self.userfault.next_fault()? {
                Some(fault) => {
                    if let Some(vm) = self.answer(fault)
                        && !reading.iter().any(|other| other.ptr_eq(&vm))
                    {
                        reading.push_back(vm);
                    }
                }
                None => {
                    if let Some(vm) = reading.pop_front()
                        && self.read_ahead(&vm)
                    {
                        reading.push_back(vm);
                    }
                }
            }
            if reading.is_empty() != idle {
                self.userfault.set_blocking(!idle)?;
            }
        }
        Ok(())
    }

    /// Answers a fault. The VM, if it reads on.
    fn answer(&self, fault: Fault) -> Option<Weak<VmMemory>> {
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
        let Some((vm, offset)) = vm else {
            // Its VM has just gone, with all that waited.
            tracing::trace!(address = fault.address, "a fault of no VM");
            return None;
        };
        self.take_in_hand(&vm, || vm.answer(self, offset, fault.written))
            .then(|| Arc::downgrade(&vm))
    }

    /// Brings the next pages ahead of a VM. Whether there are more.
    fn read_ahead(&self, vm: &Weak<VmMemory>) -> bool {
        vm.upgrade()
            .is_some_and(|vm| self.take_in_hand(&vm, || vm.read_ahead()))
    }

    /// Calls `work`; should it kill this thread, that was because of `vm`.
    fn take_in_hand<T>(&self, vm: &Arc<VmMemory>, work: impl FnOnce() -> T) -> T {
        *self.in_hand.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(vm);
        let done = work();
        *self.in_hand.lock().unwrap_or_else(PoisonError::into_inner) = Weak::new();
        done
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
