//! Lives of a VM: the first one, and one more after each rewind.
//!
//! What a VM tells goes with the number of the life that it was told in, so that nothing of an old life
//! reaches the new one, however late it comes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::Sender;

use forkvm_vmm::{EventSink, VmEvent};

use super::Message;
use super::seen::Watch;
use crate::vm_memory::Lose;

/// Where the events of one VM go, and which life they belong to.
pub(crate) struct Life {
    /// Shared with the VM's threads.
    number: Arc<AtomicU32>,
    /// The last one that any life of this member was given, also one that never began.
    last: Arc<AtomicU32>,
    sender: Sender<Message>,
    watch: Arc<Watch>,
}

impl Life {
    /// The number of the first one.
    pub(crate) const FIRST: u32 = 0;

    /// The first one.
    pub(super) fn first(sender: Sender<Message>, watch: Arc<Watch>) -> Life {
        Life {
            number: Arc::default(),
            last: Arc::default(),
            sender,
            watch,
        }
    }

    /// The next one, in another VM: what comes of the present one is of the past once that is lived.
    pub(super) fn next(&self) -> Life {
        Life {
            number: Arc::new(AtomicU32::new(self.new_number())),
            last: self.last.clone(),
            sender: self.sender.clone(),
            watch: self.watch.clone(),
        }
    }

    /// The next one in the same VM, whose threads stand still and have told all that they had to.
    pub(super) fn go_on(&self) {
        self.number.store(self.new_number(), Ordering::Release);
    }

    fn new_number(&self) -> u32 {
        self.last.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Its number.
    pub(super) fn number(&self) -> u32 {
        self.number.load(Ordering::Acquire)
    }

    /// For the VM's vCPU threads.
    pub(crate) fn event_sink(&self) -> EventSink {
        let (sender, watch, number) =
            (self.sender.clone(), self.watch.clone(), self.number.clone());
        let send = move |message| {
            if sender.send(message).is_err() {
                tracing::trace!("an event of a VM that is being torn down");
            }
        };
        Arc::new(move |event| {
            let life = number.load(Ordering::Acquire);
            match event {
                VmEvent::Running { at } => watch.ran(life, at),
                VmEvent::Report { value, at } => watch.reported(life, value, at),
                VmEvent::Call { vcpu, call, at } => {
                    watch.acted(life, at);
                    send(Message::Call {
                        life,
                        vcpu,
                        call,
                        at,
                    });
                }
                VmEvent::Ended(reason) => send(Message::Ended { life, reason }),
            }
        })
    }

    /// For the VM's memory.
    pub(crate) fn lose(&self) -> Lose {
        let (sender, number) = (self.sender.clone(), self.number.clone());
        Box::new(move |why| {
            let (life, why) = (number.load(Ordering::Acquire), why.to_string());
            if sender.send(Message::Lost { life, why }).is_err() {
                tracing::trace!("memory of a VM that is being torn down is lost");
            }
        })
    }
}
