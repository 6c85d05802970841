//! A VM between its restore and its start.

use std::sync::{Arc, Mutex};

use forkvm_vmm::ReadyVm;

use super::door::Door;
use super::serving::Serving;
use super::{Inbox, Member};
use crate::attached::Attached;
use crate::family::Family;
use crate::parked::Parked;
use crate::spawn::SpawnError;
use crate::timeline::Timeline;
use crate::vm_memory::VmMemory;

/// A VM that waits for its start, with the thread that will serve it.
///
/// The thread is there before, so that the start of many VMs is not held up by those that run
/// already. Dropped instead of started, all of it goes.
pub(crate) struct Waiting {
    family: Arc<Family>,
    member: Arc<Member>,
    vm: ReadyVm,
    // After the VM: what watches its memory goes last.
    memory: Arc<VmMemory>,
    attached: Attached,
    inbox: Inbox,
    thread: Parked,
}

impl Waiting {
    /// Of a VM whose state is in place; `thread` will serve it.
    pub(crate) fn new(
        family: &Arc<Family>,
        vm: ReadyVm,
        memory: Arc<VmMemory>,
        attached: Attached,
        inbox: Inbox,
        timeline: Timeline,
        thread: Parked,
    ) -> Waiting {
        let mut seen = inbox.watch.lock();
        seen.timeline = timeline;
        let name = seen.identity.name.clone();
        drop(seen);
        let member = Arc::new(Member {
            name,
            config: vm.config().clone(),
            door: Door::Here(inbox.sender.clone()),
            watch: inbox.watch.clone(),
            touches: memory.touches(),
            thread: Mutex::new(None),
        });
        Waiting {
            family: family.clone(),
            member,
            vm,
            memory,
            attached,
            inbox,
            thread,
        }
    }

    /// Its handle.
    pub(crate) fn member(&self) -> &Arc<Member> {
        &self.member
    }

    /// Lets it run.
    pub(crate) fn start(self) -> Result<Arc<Member>, SpawnError> {
        let Waiting {
            family,
            member,
            vm,
            memory,
            attached,
            inbox,
            thread,
        } = self;
        // Before it runs: what a family that ends has not heard of it could not end.
        family.enter(&member)?;
        // Before its thread can have waited for its end: who waits for that joins the thread.
        let mut joins = member.thread();
        let vm = vm.start();
        let serving = {
            let (family, member) = (family.clone(), member.clone());
            move || Serving::new(family, member, vm, memory, attached, inbox).serve()
        };
        *joins = Some(thread.begin(&format!("vm-{}", member.name), serving));
        drop(joins);
        Ok(member)
    }
}
