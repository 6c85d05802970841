//! Tells the engine what one clone shows, and what it leaves.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Instant;

use forkvm_devices::block::BlockLayer;

use super::console::Console;
use super::home::Entry;
use super::{Clones, Engine};
use crate::end::End;
use crate::identity::Identity;
use crate::member::{Finished, Witness};
use crate::timeline::Timeline;
use crate::wire::{Told, disks, shortened};

/// See the module's text.
pub(super) struct Teller {
    pub(super) clone: u64,
    /// What each disk stood on at its start.
    pub(super) below: Vec<Arc<dyn BlockLayer>>,
    pub(super) console: Arc<Console>,
    pub(super) engine: Arc<Engine>,
    pub(super) running: Arc<Clones>,
    pub(super) _place: Entry,
}

impl Teller {
    /// Tells it behind all that the clone has printed.
    fn tell(&self, told: &Told) {
        self.console.send();
        self.engine.tell(told, &[]);
    }
}

impl Witness for Teller {
    fn ran(&self, at: Instant) {
        let (clone, at) = (self.clone, at.into());
        self.engine.tell(&Told::Ran { clone, at }, &[]);
    }

    fn acted(&self, at: Instant) {
        let (clone, at) = (self.clone, at.into());
        self.tell(&Told::Acted { clone, at });
    }

    fn reported(&self, value: u32, at: Instant) {
        let (clone, at) = (self.clone, at.into());
        self.tell(&Told::Reported { clone, value, at });
    }

    fn forked(&self, identity: &Identity) {
        let (clone, identity) = (self.clone, identity.clone());
        self.tell(&Told::Identified { clone, identity });
    }

    fn reborn(&self, identity: &Identity, timeline: &Timeline) {
        let passed = |at: Option<Instant>| at.unwrap_or_else(Instant::now).into();
        self.tell(&Told::Reborn {
            clone: self.clone,
            identity: identity.clone(),
            asked: passed(timeline.spawn_requested),
            built: passed(timeline.built),
            restored: passed(timeline.restored),
        });
    }

    fn ended(&self, finished: &Finished) {
        self.console.send();
        let (end, (disks, files)) = match disks::hand_over(&self.below, &finished.disks) {
            Ok(held) => (finished.end.clone(), held),
            Err(error) => {
                let why = format!(
                    "it {}, and handing over its disks failed: {error}",
                    finished.end
                );
                (End::Failed(why), Default::default())
            }
        };
        let told = Told::Ended {
            clone: self.clone,
            end: match end {
                End::Failed(why) => End::Failed(shortened(why)),
                end => end,
            },
            counters: finished.blk_counters.clone(),
            disks,
        };
        let files: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
        self.engine.tell(&told, &files);
        drop(self.running.lock().remove(&self.clone));
    }
}
