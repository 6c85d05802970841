//! An earlier image as a source.

use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use forkvm_vmm::memory::{self, PAGE};

use super::super::local_image::LocalImage;
use super::content;
use super::kit::conforms;
use crate::image::MemoryImage;

const LEN: u64 = 64 * PAGE;
const OWN: [Range<u64>; 3] = [0..1, 5..9, 63..64];

#[test]
fn an_image_conforms_and_asking_it_makes_no_page() {
    let file = Arc::new(memory::memfd(c"image", LEN).unwrap());
    for number in OWN.into_iter().flatten() {
        file.write_all_at(&content(number), number * PAGE).unwrap();
    }
    let image = MemoryImage::whole(file.clone(), LEN);
    conforms(&LocalImage(&image), LEN, &OWN);
    let data = memory::data_extents(&file).unwrap();
    assert_eq!(data, OWN.map(|run| run.start * PAGE..run.end * PAGE));
}
