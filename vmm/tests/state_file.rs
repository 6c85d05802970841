//! What a user of a state file relies on: it holds any state, and shows any damage by name.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::path::PathBuf;

use forkvm_devices::{Section, Sections};
use forkvm_vmm::state_file::{
    EncodeError, MAX_FILE_LEN, MAX_SECTION_LEN, MAX_SECTIONS, SaveId, StateFile, StateFileError,
    decode, encode, read,
};
use proptest::prelude::*;

const HEADER_LEN: usize = 44;

fn section(kind: &str, version: u16, body: &[u8]) -> Section {
    Section {
        kind: kind.to_owned(),
        version,
        body: body.to_vec(),
    }
}

fn sections(list: impl IntoIterator<Item = Section>) -> Sections {
    let mut sections = Sections::default();
    for section in list {
        sections.push(section).unwrap();
    }
    sections
}

/// The content of `golden/state-v1`: CBOR of a map, of a byte string, and an empty body.
fn golden() -> StateFile {
    StateFile {
        save: SaveId::from_bytes(std::array::from_fn(|i| i as u8 + 1)),
        sections: sections([
            section(
                "config",
                3,
                b"\xa2\x65vcpus\x02\x66memory\x1a\x20\x00\x00\x00",
            ),
            section("kvm/vcpu/0", 1, b"\x48\x00\x11\x22\x33\x44\x55\x66\x77"),
            section("dev/blk0", 65535, b""),
        ]),
    }
}

fn golden_bytes() -> Vec<u8> {
    let state = golden();
    encode(&state.sections, state.save).unwrap()
}

fn golden_path() -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "golden", "state-v1"]
        .iter()
        .collect()
}

#[test]
fn a_state_file_of_format_1_is_read_and_written_as_ever() {
    let bytes = fs::read(golden_path()).unwrap();
    assert_eq!(decode(&bytes).unwrap(), golden());
    assert_eq!(golden_bytes(), bytes);
}

#[test]
#[ignore = "makes the golden file for a new format version, when FORKVM_MAKE_GOLDEN is set"]
fn make_golden_state_file() {
    if std::env::var_os("FORKVM_MAKE_GOLDEN").is_none() {
        return;
    }
    fs::File::create_new(golden_path())
        .unwrap()
        .write_all(&golden_bytes())
        .unwrap();
}

fn any_sections() -> impl Strategy<Value = Sections> {
    let kind = prop_oneof!["[a-z/0-9]{1,12}", "\\PC{0,60}", "[a-z]{255}"];
    let body = prop::collection::vec(any::<u8>(), 0..600);
    prop::collection::btree_map(kind, (any::<u16>(), body), 0..20).prop_map(|map| {
        let map: BTreeMap<String, (u16, Vec<u8>)> = map;
        sections(
            map.iter()
                .map(|(kind, (version, body))| section(kind, *version, body)),
        )
    })
}

/// Puts the right checksums on a file that somebody has changed, as an attacker would.
fn reseal(bytes: &mut [u8]) {
    let header = crc32fast::hash(&bytes[..40]);
    bytes[40..44].copy_from_slice(&header.to_le_bytes());
    let end = bytes.len() - 4;
    let mut at = HEADER_LEN;
    for _ in 0..u16::from_le_bytes([bytes[12], bytes[13]]) {
        let Some(name_len) = bytes[..end].get(at).map(|len| usize::from(*len)) else {
            break;
        };
        let fields_end = at + 1 + name_len + 6;
        let Some(len) = bytes[..end].get(fields_end - 4..fields_end) else {
            break;
        };
        let len = u32::from_le_bytes(len.try_into().unwrap()) as usize;
        let body = fields_end + 4..fields_end + 4 + len;
        if body.end > end {
            break;
        }
        let mut crc = crc32fast::Hasher::new();
        crc.update(&bytes[at..fields_end]);
        crc.update(&bytes[body.clone()]);
        bytes[fields_end..fields_end + 4].copy_from_slice(&crc.finalize().to_le_bytes());
        at = body.end;
    }
    let mut crc = crc32fast::Hasher::new();
    crc.update(&bytes[..40]);
    crc.update(&bytes[HEADER_LEN..end]);
    bytes[end..].copy_from_slice(&crc.finalize().to_le_bytes());
}

proptest! {
    #[test]
    fn any_state_comes_back_as_it_was(sections in any_sections(), id in any::<[u8; 16]>()) {
        let state = StateFile { save: SaveId::from_bytes(id), sections };
        let bytes = encode(&state.sections, state.save).unwrap();
        prop_assert_eq!(&decode(&bytes).unwrap(), &state);
        prop_assert_eq!(&read(bytes.as_slice()).unwrap(), &state);
    }

    #[test]
    fn a_state_file_that_an_attacker_resealed_is_refused_or_is_one_we_would_write(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in 0usize..3,
    ) {
        let mut bytes = golden_bytes();
        bytes.truncate(bytes.len() - cut);
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        reseal(&mut bytes);
        if let Ok(state) = decode(&bytes) {
            prop_assert_eq!(encode(&state.sections, state.save).unwrap(), bytes);
        }
    }

    #[test]
    fn arbitrary_bytes_are_never_a_state(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(decode(&bytes).is_err());
        let after_magic = [b"FORKVM-S\x01\0\x01".as_slice(), &bytes].concat();
        prop_assert!(decode(&after_magic).is_err());
    }
}

#[test]
fn every_flipped_bit_is_noticed() {
    let bytes = golden_bytes();
    for bit in 0..bytes.len() * 8 {
        let mut damaged = bytes.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(
            decode(&damaged).is_err(),
            "bit {bit} flipped, and nobody saw it"
        );
        assert!(
            read(damaged.as_slice()).is_err(),
            "bit {bit} flipped, and read() did not see it"
        );
    }
}

#[test]
fn every_truncation_is_called_a_truncation() {
    let bytes = golden_bytes();
    for len in 0..bytes.len() {
        for result in [decode(&bytes[..len]), read(&bytes[..len])] {
            assert!(
                matches!(result, Err(StateFileError::Truncated { found, .. }) if found == len as u64),
                "cut to {len} bytes: {result:?}"
            );
        }
    }
}

#[test]
fn bytes_after_the_end_are_refused_even_when_they_never_end() {
    let bytes = golden_bytes();
    let longer = [bytes.as_slice(), &[0]].concat();
    assert!(matches!(
        decode(&longer),
        Err(StateFileError::Trailing { .. })
    ));
    let endless = bytes.as_slice().chain(std::io::repeat(0));
    assert!(matches!(
        read(endless),
        Err(StateFileError::Trailing { .. })
    ));
}

#[test]
fn damage_in_a_section_names_it_and_where_it_is() {
    let mut bytes = golden_bytes();
    let end = bytes.len() - 4;
    // The last section is `dev/blk0`, empty: 1 + 8 + 2 + 4 + 4 bytes before the end.
    let offset = end - 19;
    bytes[offset + 9] ^= 1; // its version
    match decode(&bytes) {
        Err(StateFileError::SectionDamaged {
            section,
            offset: found,
        }) => {
            assert_eq!(
                (section.index, section.kind.as_deref()),
                (2, Some("dev/blk0"))
            );
            assert_eq!(found, offset);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_section_from_another_save_is_noticed_though_it_is_whole() {
    let ours = encode(&sections([section("dev/rng", 1, b"ours")]), None).unwrap();
    let theirs = encode(&sections([section("dev/rng", 1, b"hers")]), None).unwrap();
    let end = ours.len() - 4;
    let mixed = [&ours[..HEADER_LEN], &theirs[HEADER_LEN..end], &ours[end..]].concat();
    assert!(matches!(decode(&mixed), Err(StateFileError::File { .. })));
}

#[test]
fn a_header_from_another_save_is_noticed_though_it_is_whole() {
    let sections = sections([section("dev/rng", 1, b"body")]);
    let ours = encode(&sections, SaveId::from_bytes([1; 16])).unwrap();
    let theirs = encode(&sections, SaveId::from_bytes([2; 16])).unwrap();
    let mixed = [&theirs[..HEADER_LEN], &ours[HEADER_LEN..]].concat();
    assert!(matches!(decode(&mixed), Err(StateFileError::File { .. })));
}

/// Changes `golden`, puts the right checksums on it again, and decodes it.
fn resealed(change: impl FnOnce(&mut Vec<u8>)) -> StateFileError {
    let mut bytes = golden_bytes();
    change(&mut bytes);
    reseal(&mut bytes);
    decode(&bytes).unwrap_err()
}

#[test]
fn what_is_wrong_is_said_by_name() {
    use StateFileError as E;
    let put = |at: usize, new: &'static [u8]| {
        resealed(move |bytes| bytes[at..at + new.len()].copy_from_slice(new))
    };
    assert!(matches!(put(0, b"\x7fELF"), E::Foreign));
    assert!(matches!(put(0, b"FORKVM-M"), E::MemoryFile));
    assert!(matches!(put(8, &[2, 0]), E::Format { found: 2 }));
    assert!(matches!(put(8, &[0, 0]), E::Format { found: 0 }));
    assert!(matches!(put(10, &[2]), E::Architecture { found: 2 }));
    assert!(matches!(put(11, &[1]), E::Reserved { offset: 11 }));
    assert!(matches!(put(15, &[1]), E::Reserved { offset: 14 }));
    assert!(matches!(
        put(12, &[0xff, 0xff]),
        E::TooManySections { count: 0xffff }
    ));
    assert!(matches!(put(12, &[2, 0]), E::Unclaimed { len: 19, .. }));
    assert!(matches!(put(12, &[4, 0]), E::SectionTruncated { .. }));
    assert!(matches!(
        put(16, &[0xff; 8]),
        E::FileLength { len: u64::MAX }
    ));
    assert!(matches!(put(16, &[47, 0]), E::FileLength { len: 47 }));
    assert!(matches!(
        put(HEADER_LEN, &[255]),
        E::SectionTruncated { .. }
    ));
    assert!(matches!(
        put(HEADER_LEN + 1, &[0xff]),
        E::SectionName { .. }
    ));
    let first_len = HEADER_LEN + 1 + "config".len() + 2;
    assert!(matches!(
        put(first_len, &[0xff; 4]),
        E::SectionLength { len: u32::MAX, .. }
    ));
    assert!(matches!(
        put(first_len, &[0, 0, 0, 4]),
        E::SectionTruncated { .. }
    ));

    let mut damaged = golden_bytes();
    damaged[20] ^= 1;
    assert!(matches!(decode(&damaged), Err(E::Header)));
}

#[test]
fn a_newer_file_is_called_newer_whatever_follows_its_version() {
    let mut bytes = golden_bytes();
    bytes[8] = 9;
    bytes[11..].fill(0xee);
    let error = decode(&bytes).unwrap_err();
    assert!(matches!(error, StateFileError::Format { found: 9 }));
    assert!(error.to_string().contains("or a newer one"), "{error}");
}

#[test]
fn a_doubled_section_is_refused_by_name() {
    let bytes = encode(
        &sections([section("a", 1, b"x"), section("b", 1, b"x")]),
        None,
    )
    .unwrap();
    let mut doubled = bytes;
    let second_name = HEADER_LEN + (1 + 1 + 2 + 4 + 4 + 1) + 1;
    assert_eq!(doubled[second_name], b'b');
    doubled[second_name] = b'a';
    reseal(&mut doubled);
    match decode(&doubled) {
        Err(StateFileError::Duplicate { section, .. }) => {
            assert_eq!((section.index, section.kind.as_deref()), (1, Some("a")));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_announced_length_is_not_believed_before_the_bytes_have_come() {
    let mut header = golden_bytes()[..HEADER_LEN].to_vec();
    header[16..24].copy_from_slice(&(MAX_FILE_LEN as u64).to_le_bytes());
    let crc = crc32fast::hash(&header[..40]);
    header[40..].copy_from_slice(&crc.to_le_bytes());
    let expected = MAX_FILE_LEN as u64;
    assert!(matches!(
        read(header.as_slice()),
        Err(StateFileError::Truncated { expected: e, found: 44 }) if e == expected
    ));
}

#[test]
fn a_state_beyond_the_limits_is_not_written() {
    let many = sections((0..=MAX_SECTIONS).map(|i| section(&i.to_string(), 1, b"")));
    assert_eq!(
        encode(&many, None),
        Err(EncodeError::TooManySections {
            count: MAX_SECTIONS + 1
        })
    );
    let name = "n".repeat(256);
    let named = sections([section(&name, 1, b"")]);
    assert_eq!(
        encode(&named, None),
        Err(EncodeError::NameTooLong { kind: name })
    );
    let big = sections([section("big", 1, &vec![0; MAX_SECTION_LEN + 1])]);
    assert_eq!(
        encode(&big, None),
        Err(EncodeError::SectionTooLong {
            kind: "big".into(),
            len: MAX_SECTION_LEN + 1
        })
    );
}

#[test]
fn two_saves_never_share_their_mark() {
    assert_ne!(SaveId::random().unwrap(), SaveId::random().unwrap());
}
