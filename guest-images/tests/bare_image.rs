//! The embedded guest is an ELF that both boot protocols find their entry in.

use forkvm_guest_images::BARE;

/// Program header types (ELF-64, figure 7).
const PT_LOAD: u64 = 1;
const PT_NOTE: u64 = 4;
/// Type of the note that holds the 32-bit entry (Xen's `elfnote.h`).
const PHYS32_ENTRY: u64 = 18;

/// The little-endian number of `len` bytes at `offset`.
fn number(bytes: &[u8], offset: usize, len: usize) -> u64 {
    let mut wide = [0; 8];
    wide[..len].copy_from_slice(&bytes[offset..offset + len]);
    u64::from_le_bytes(wide)
}

/// Program headers as (type, bytes in the file, physical address, length in memory).
fn segments() -> Vec<(u64, &'static [u8], u64, u64)> {
    let table = number(BARE, 0x20, 8) as usize;
    let segment = |index: usize| {
        let at = table + index * 56;
        let [offset, _, address, file, memory] =
            [8, 16, 24, 32, 40].map(|o| number(BARE, at + o, 8));
        let bytes = &BARE[offset as usize..(offset + file) as usize];
        (number(BARE, at, 4), bytes, address, memory)
    };
    (0..number(BARE, 0x38, 2) as usize).map(segment).collect()
}

fn is_loaded(address: u64) -> bool {
    segments().iter().any(|&(kind, bytes, start, _)| {
        kind == PT_LOAD && (start..start + bytes.len() as u64).contains(&address)
    })
}

#[test]
fn it_is_a_static_64_bit_elf_for_x86_64() {
    assert_eq!(&BARE[..6], b"\x7fELF\x02\x01");
    assert_eq!(number(BARE, 0x10, 2), 2, "ET_EXEC");
    assert_eq!(number(BARE, 0x12, 2), 62, "EM_X86_64");
}

#[test]
fn its_64_bit_entry_is_loaded() {
    assert!(is_loaded(number(BARE, 0x18, 8)));
}

#[test]
fn its_pvh_note_names_another_entry_that_is_loaded() {
    let (_, note, _, _) = segments()
        .into_iter()
        .find(|s| s.0 == PT_NOTE)
        .expect("a note");
    assert_eq!(number(note, 0, 4), 4);
    assert_eq!(number(note, 8, 4), PHYS32_ENTRY);
    assert_eq!(&note[12..16], b"Xen\0");
    let entry = number(note, 16, 8);
    assert!(is_loaded(entry));
    assert_ne!(entry, number(BARE, 0x18, 8));
}

#[test]
fn it_leaves_the_first_mib_to_whoever_boots_it_and_fits_into_16_mib() {
    for (_, _, start, len) in segments().into_iter().filter(|s| s.0 == PT_LOAD) {
        assert!(
            start >= 1 << 20 && start + len <= 16 << 20,
            "{start:#x} + {len:#x}"
        );
    }
}
