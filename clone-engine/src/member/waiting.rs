//! A VM between its restore and its start.

use std::io;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;

use forkvm_vmm::{ReadyVm, Vm};

use super::serving::Serving;
use super::{Inbox, Member};
use crate::disks::DiskSource;
use crate::family::Family;
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
    vm: Option<ReadyVm>,
    /// Where the thread waits for the running VM.
    serve: Option<Sender<Vm>>,
}

impl Waiting {
    /// Of a VM whose state is in place.
    pub(crate) fn new(
        family: &Arc<Family>,
        vm: ReadyVm,
        memory: Arc<VmMemory>,
        disks: Vec<DiskSource>,
        inbox: Inbox,
        timeline: Timeline,
    ) -> Result<Waiting, SpawnError> {
        let name = inbox.watch.lock().identity.name.clone();
        inbox.watch.lock().timeline = timeline;
        let member = Arc::new(Member {
            name: name.clone(),
            config: vm.config().clone(),
            inbox: inbox.sender,
            watch: inbox.watch,
            touches: memory.touches(),
            thread: Mutex::new(None),
        });
        let (serve, started) = channel();
        let serving = {
            let (family, member) = (family.clone(), member.clone());
            move || {
                let Ok(vm) = started.recv() else { return };
                Serving::new(family, member, vm, memory, disks, inbox.receiver).serve();
            }
        };
        let thread = thread::Builder::new()
            .name(format!("vm-{name}"))
            .spawn(serving);
        let thread = thread.map_err(|source| SpawnError::Host {
            what: "a thread to serve the VM",
            source,
        })?;
        *member.thread() = Some(thread);
        Ok(Waiting {
            family: family.clone(),
            member,
            vm: Some(vm),
            serve: Some(serve),
        })
    }

    /// Lets it run.
    pub(crate) fn start(mut self) -> Result<Arc<Member>, SpawnError> {
        // Before it runs: what a family that ends has not heard of it could not end.
        self.family.enter(&self.member)?;
        let (Some(vm), Some(serve)) = (self.vm.take(), self.serve.take()) else {
            unreachable!("both are there until the start or the drop");
        };
        if serve.send(vm.start()).is_err() {
            self.family.leave(&self.member);
            let source = io::Error::other("it is gone");
            return Err(SpawnError::Host {
                what: "to the thread that should serve the VM",
                source,
            });
        }
        Ok(self.member.clone())
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        // After a start there is nothing left to drop, and the thread has its own work.
        if let Some(serve) = self.serve.take() {
            drop((serve, self.vm.take()));
            self.member.join_thread();
        }
    }
}
