//! What is refused before a machine runs.

use std::fs;

use super::*;
use crate::memory::Ram;

const MIB: u64 = 16;

/// What comes of booting a file with `content`, and an initrd of `initrd` bytes.
fn boot(content: &[u8], initrd: Option<u64>) -> Result<Entry, BootError> {
    let folder = tempfile::tempdir().unwrap();
    let kernel = folder.path().join("kernel");
    fs::write(&kernel, content).unwrap();
    let initrd = initrd.map(|len| {
        let path = folder.path().join("initrd");
        File::create(&path).unwrap().set_len(len).unwrap();
        path
    });
    let ram = Ram::new(MemoryLayout::new(MIB).unwrap()).unwrap();
    let around = Surroundings {
        memory: ram.guest(),
        layout: ram.layout(),
        vcpus: 1,
        slots: &[],
        software_kvm: false,
    };
    load(&around, &Payload::Kernel { kernel, initrd }, "")
}

/// An executable without a segment: the header alone (elf(5)).
fn header(class: u8, machine: u16) -> Vec<u8> {
    let mut header = vec![0; 64];
    header[..4].copy_from_slice(ELF_MAGIC);
    // Little-endian, version 1.
    header[4..7].copy_from_slice(&[class, 1, 1]);
    header[16] = 2;
    header[18..20].copy_from_slice(&machine.to_le_bytes());
    header[20] = 1;
    // Entry and program headers, of which there are none.
    header[24..32].copy_from_slice(&HIGH_MEMORY.to_le_bytes());
    header[32] = 64;
    header[52] = 64;
    header[54] = 56;
    header
}

#[track_caller]
fn refused(content: &[u8], said: &str) {
    let error = boot(content, None).unwrap_err();
    let BootError::Payload { why, .. } = &error else {
        panic!("{error}");
    };
    assert!(why.contains(said), "{said:?} is not in {why:?}");
    assert!(error.to_string().contains("kernel cannot be booted"));
}

#[test]
fn what_is_no_kernel_is_refused() {
    refused(b"", "");
    refused(b"Lorem ipsum dolor sit amet. ", "");
    refused(&[0; 0x1000], "");
}

#[test]
fn a_kernel_of_another_architecture_is_refused_by_it() {
    const EM_386: u16 = 3;
    const EM_AARCH64: u16 = 183;
    refused(&header(ELFCLASS64, EM_AARCH64), "e_machine 183");
    refused(&header(1, EM_386), "64 bits");
}

#[test]
fn a_kernel_that_is_cut_off_is_refused() {
    let whole = header(ELFCLASS64, EM_X86_64);
    refused(&whole[..12], "cut off");
    refused(&whole[..40], "");
}

#[test]
fn an_initrd_that_memory_has_no_room_for_is_refused_with_its_size_and_the_room() {
    let kernel = header(ELFCLASS64, EM_X86_64);
    boot(&kernel, Some(4 << 20)).unwrap();
    let len = MIB << 20;
    match boot(&kernel, Some(len)) {
        Err(BootError::InitrdSize {
            len: told, room, ..
        }) => {
            assert_eq!(told, len);
            assert!(room < len, "{room}");
        }
        other => panic!("{other:?}"),
    }
}
