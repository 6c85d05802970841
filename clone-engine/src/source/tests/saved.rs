//! A saved machine's memory file as a source.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use forkvm_vmm::memory::PAGE;
use forkvm_vmm::memory_file::{self, MemoryFile};
use forkvm_vmm::state_file::SaveId;
use forkvm_vmm::{MemoryLayout, Ram};
use vm_memory::{Bytes, GuestAddress};

use super::super::saved_memory::SavedMemory;
use super::super::{PageSource, SourceError};
use super::kit::conforms;
use super::{content, faults, has_userfaultfd, image_of, page};
use crate::image::OwnerTable;

const MIB: u64 = 16;
const LEN: u64 = MIB << 20;
const LAST: u64 = LEN / PAGE - 1;
/// Parts of chunks, a whole one, one across two, and the last page.
const OWN: [std::ops::Range<u64>; 5] = [3..5, 16..32, 47..49, 100..101, LAST..LAST + 1];

fn saved_file() -> File {
    let ram = Ram::new(MemoryLayout::new(MIB).unwrap()).unwrap();
    for number in OWN.into_iter().flatten() {
        let address = GuestAddress(number * PAGE);
        ram.guest().write_slice(&content(number), address).unwrap();
    }
    let file = tempfile::tempfile().unwrap();
    let save = SaveId::random().unwrap();
    memory_file::write(&file, save, &ram.source().unwrap(), &mut |_| {}).unwrap();
    file
}

fn source(file: File) -> SavedMemory {
    SavedMemory::new(MemoryFile::open(file, "memory").unwrap())
}

#[test]
fn a_saved_machine_conforms() {
    conforms(&source(saved_file()), LEN, &OWN);
}

#[test]
fn the_pages_of_a_saved_machine_are_those_that_held_something() {
    let data = source(saved_file()).data();
    assert_eq!(data, OWN.map(|run| run.start * PAGE..run.end * PAGE));
}

#[test]
fn an_image_of_a_saved_machine_holds_what_was_saved_and_no_zero_page() {
    if !has_userfaultfd() {
        return;
    }
    let faults = faults();
    let image = image_of(&faults, LEN / PAGE, &OWN, Arc::new(source(saved_file())));
    image.complete().unwrap();
    for number in OWN.into_iter().flatten() {
        assert!(page(&image, number) == content(number), "page {number}");
    }
    let data = forkvm_vmm::memory::data_extents(image.file()).unwrap();
    assert_eq!(data, OWN.map(|run| run.start * PAGE..run.end * PAGE));
}

#[test]
fn a_damaged_chunk_costs_those_who_need_it_and_is_named() {
    if !has_userfaultfd() {
        return;
    }
    let file = saved_file();
    let memory = MemoryFile::open(file.try_clone().unwrap(), "memory").unwrap();
    let (chunk, damaged) = (memory_file::CHUNK as u64, 20 * PAGE);
    file.write_all_at(&[0xee], memory.data_start() + damaged)
        .unwrap();
    let table = OwnerTable::own(LEN, &source(file.try_clone().unwrap()).data());
    assert_eq!(
        table.populated().len(),
        OWN.len(),
        "the table of chunks is whole"
    );
    let faults = faults();
    let image = image_of(&faults, LEN / PAGE, &OWN, Arc::new(source(file)));
    for number in [3, 47, 48, 100, LAST] {
        image.prefetch(number * PAGE).unwrap();
        assert!(page(&image, number) == content(number), "page {number}");
    }
    let error = image.prefetch(damaged).unwrap_err();
    let SourceError::Damaged { offset, name, .. } = &error else {
        panic!("{error}");
    };
    assert_eq!(
        (*offset, name.as_str()),
        (damaged / chunk * chunk, "the saved machine")
    );
    assert!((16..32).all(|number| page(&image, number) == vec![0; PAGE as usize]));
    // It is not the end of the others.
    image.prefetch(4 * PAGE).unwrap();
}

#[test]
fn a_saved_machine_is_never_in_memory() {
    let source = source(saved_file());
    let local = source.local(&(3 * PAGE..4 * PAGE), &mut |_| panic!("it was shown"));
    assert!(!local, "its chunks must be checked first");
}
