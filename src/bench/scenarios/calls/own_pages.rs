//! What it takes to find the pages that a VM has written since it maps an image.
//!
//! One PAGEMAP_SCAN of all RAM, or several where the pages lie far apart; before Linux 6.7 a read of
//! /proc/self/pagemap. A fork by `delta` asks in its pause.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Instant;

use forkvm_vmm::memory::{self, PAGE};
use forkvm_vmm::{Backing, MemoryLayout, Ram};
use vm_memory::{Bytes, GuestAddress};

use crate::bench::measure::{BenchError, Experiment, Repetitions, Samples, Unit, call};

/// RAM of the VM, in MiB.
const MIB: u64 = 512;
/// What its image holds, in bytes.
const POPULATED: usize = 64 << 20;
/// Pages that it has written.
const OWN: u64 = 2048;

/// See the module's text.
pub(super) struct OwnPages {
    measured: u32,
    image: Option<Arc<File>>,
}

impl OwnPages {
    pub(super) fn new(measured: u32) -> OwnPages {
        OwnPages {
            measured,
            image: None,
        }
    }
}

/// How far apart they lie, in pages.
const LIE: [(&str, u64); 2] = [("in-one-piece", 1), ("scattered", 8)];

impl Experiment for OwnPages {
    fn name(&self) -> String {
        format!("own-pages/{MIB}-MiB")
    }

    fn repetitions(&self) -> Repetitions {
        Repetitions {
            warm_up: 3,
            measured: self.measured,
        }
    }

    fn prepare(&mut self) -> Result<(), BenchError> {
        let image = memory::memfd(c"forkvm-bench", MIB << 20)?;
        let populated = image.write_all_at(&vec![0x5a; POPULATED], 0);
        populated.map_err(call("writing a memfd"))?;
        self.image = Some(Arc::new(image));
        Ok(())
    }

    fn repeat(&mut self, samples: &mut Samples) -> Result<(), BenchError> {
        let Some(image) = &self.image else {
            return Ok(());
        };
        for (lie, apart) in LIE {
            let backing = Backing::Private(Arc::new(image.clone()));
            let ram = Ram::map(MemoryLayout::new(MIB)?, backing)?;
            for page in 0..OWN {
                let address = GuestAddress(page * apart * PAGE);
                let written = ram.guest().write_obj(1u8, address);
                written.map_err(|error| call("a write")(io::Error::other(error)))?;
            }
            let start = Instant::now();
            let own = ram.own_pages()?;
            let took = start.elapsed();
            let pages: u64 = own
                .iter()
                .map(|range| (range.end - range.start) / PAGE)
                .sum();
            if pages != OWN {
                let found = format!("{pages} pages were found, of {OWN}");
                return Err(call("looking for own pages")(io::Error::other(found)));
            }
            let case = format!("{}/{OWN}-{lie}", self.name());
            samples.time(&case, Unit::Us, took);
        }
        Ok(())
    }
}
