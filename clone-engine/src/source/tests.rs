//! The conformance kit of [`PageSource`], and what an image makes of sources that do not conform.
#![allow(clippy::single_range_in_vec_init)] // Lists of ranges, some of one.

mod afar;
mod image;
mod kit;
mod liars;
mod live;
mod saved;
mod service;

use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use forkvm_vmm::memory::PAGE;

use crate::check_userfaultfd;
use crate::fault::{FaultConfig, FaultHandler};
use crate::image::{MemoryImage, OwnerTable, Plan};
use crate::working_set::WorkingSetPolicy;

/// How long the sources of these tests may be silent.
const DEADLINE: Duration = Duration::from_millis(300);

/// Whether this host has what a filling image needs; says so where it has not.
fn has_userfaultfd() -> bool {
    let checked = check_userfaultfd();
    if let Err(error) = &checked {
        println!("skipped: {error}");
    }
    checked.is_ok()
}

/// Without a copier, with small chunks and a short deadline.
fn faults() -> FaultHandler {
    let config = FaultConfig {
        chunk: 4 * PAGE,
        readahead: 0,
        working_set: WorkingSetPolicy::Off,
        shards: 1,
        background: None,
        page_deadline: DEADLINE,
    };
    FaultHandler::new(config, None)
}

/// A published image of `pages` pages, of which it takes `own` from `source`; the rest is zero.
fn image_of(
    faults: &FaultHandler,
    pages: u64,
    own: &[Range<u64>],
    source: Arc<dyn super::PageSource>,
) -> Arc<MemoryImage> {
    let own: Vec<_> = own
        .iter()
        .map(|run| run.start * PAGE..run.end * PAGE)
        .collect();
    let table = OwnerTable::own(pages * PAGE, &own);
    let empty = faults.empty_image(pages * PAGE).unwrap();
    let image = faults.image_of(empty, table, source);
    image.publish(Plan::whole(pages * PAGE)).unwrap();
    image
}

/// A page of an image, or of nothing: a hole reads as zero and stays one.
fn page(image: &MemoryImage, number: u64) -> Vec<u8> {
    let mut page = vec![0; PAGE as usize];
    image
        .file()
        .read_exact_at(&mut page, number * PAGE)
        .unwrap();
    page
}

/// What page `number` holds in these tests: no other page holds the same.
fn content(number: u64) -> Vec<u8> {
    let word = (number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let words = (0..PAGE / 8).map(|index| word.wrapping_add(index));
    words.flat_map(u64::to_le_bytes).collect()
}
