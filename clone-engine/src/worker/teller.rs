//! Tells the engine what one clone shows, and what it leaves.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Instant;

use forkvm_devices::block::Storage;
use forkvm_vmm::memory;

use super::console::Console;
use super::save_dirs::Entry;
use super::{Clones, Engine};
use crate::end::End;
use crate::member::{Finished, Witness};
use crate::wire::{HeldDisk, Told};

/// Most bytes of a reason.
const LONG_REASON: usize = 4096;

/// See the module's text.
pub(super) struct Teller {
    pub(super) clone: u64,
    /// Of each disk, whether the guest could not write to it.
    pub(super) read_only: Vec<bool>,
    pub(super) console: Arc<Console>,
    pub(super) engine: Arc<Engine>,
    pub(super) running: Arc<Clones>,
    pub(super) _saves: Option<Entry>,
}

impl Teller {
    /// Tells it behind all that the clone has printed.
    fn tell(&self, told: &Told) {
        self.console.send();
        self.engine.tell(told, &[]);
    }

    /// What the disks hold of their own, and the files that go with it.
    fn held(&self, finished: &Finished) -> io::Result<(Vec<Option<HeldDisk>>, Vec<File>)> {
        let (mut maps, mut data) = (Vec::new(), Vec::new());
        let mut disks = Vec::new();
        for (disk, read_only) in finished.disks.iter().zip(&self.read_only) {
            let Storage::Overlay { overlay, .. } = disk.storage() else {
                disks.push(None);
                continue;
            };
            if *read_only {
                disks.push(None);
                continue;
            }
            let held = overlay.held()?;
            disks.push(Some(HeldDisk {
                map_len: held.map.len() as u64,
                has_data: held.data.is_some(),
            }));
            maps.extend(held.map);
            data.extend(held.data);
        }
        if maps.is_empty() {
            return Ok((disks, Vec::new()));
        }
        let file = memory::memfd(c"forkvm-maps", maps.len() as u64).map_err(io::Error::other)?;
        file.write_all_at(&maps, 0)?;
        data.insert(0, file);
        Ok((disks, data))
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

    fn ended(&self, finished: &Finished) {
        self.console.send();
        let (end, (disks, files)) = match self.held(finished) {
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
            end: shortened(end),
            counters: finished.blk_counters.clone(),
            disks,
        };
        let files: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
        self.engine.tell(&told, &files);
        drop(self.running.lock().remove(&self.clone));
    }
}

/// `end` with a reason that fits into a message.
fn shortened(end: End) -> End {
    match end {
        End::Failed(mut why) if why.len() > LONG_REASON => {
            let cut = (0..=LONG_REASON)
                .rev()
                .find(|cut| why.is_char_boundary(*cut));
            why.truncate(cut.unwrap_or_default());
            End::Failed(why)
        }
        end => end,
    }
}
