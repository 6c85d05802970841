//! What a user of a memory file relies on: memory comes back exactly, zeros cost nothing, and no
//! damage goes unnoticed.

use std::fs::{self, File};
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;

use forkvm_vmm::memory_file::{
    CHUNK, MAX_LEN, MemoryFault, MemoryFile, MemorySource, PAGE, Progress, Written, write,
};
use forkvm_vmm::state_file::SaveId;
use proptest::prelude::*;

/// Memory of which only some ranges are announced as data; the others must never be read.
struct Sparse {
    bytes: Vec<u8>,
    data: Vec<Range<u64>>,
}

/// The content would fill screens; a failing case is small enough to be told by its ranges.
impl std::fmt::Debug for Sparse {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes, data at {:x?}", self.bytes.len(), self.data)
    }
}

impl Sparse {
    /// Announces everything.
    fn dense(bytes: Vec<u8>) -> Sparse {
        let all = 0..bytes.len() as u64;
        Sparse {
            bytes,
            data: Vec::from([all]),
        }
    }
}

impl MemorySource for Sparse {
    fn memory_len(&self) -> io::Result<u64> {
        Ok(self.bytes.len() as u64)
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let end = offset + into.len() as u64;
        if !self
            .data
            .iter()
            .any(|data| data.start <= offset && end <= data.end)
        {
            return Err(io::Error::other(format!(
                "{offset:#x}..{end:#x} was never announced"
            )));
        }
        into.copy_from_slice(&self.bytes[offset as usize..end as usize]);
        Ok(())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let next = self.data.iter().find(|data| data.end > offset);
        Ok(next.map(|data| data.start.max(offset)..data.end))
    }
}

fn save_id() -> SaveId {
    SaveId::from_bytes(std::array::from_fn(|i| i as u8 + 1)).unwrap()
}

fn quiet(_: Progress) {}

fn saved(source: &(impl MemorySource + ?Sized)) -> (File, Written) {
    let file = tempfile::tempfile().unwrap();
    let written = write(&file, save_id(), source, &mut quiet).unwrap();
    (file, written)
}

fn open(file: &File) -> Result<MemoryFile, MemoryFault> {
    MemoryFile::open(file.try_clone().unwrap(), "memory").map_err(|error| error.fault)
}

/// Opens and checks everything.
fn check(file: &File) -> Result<(), MemoryFault> {
    open(file)?.verify(&mut quiet).map_err(|error| error.fault)
}

fn fresh_target(len: u64) -> File {
    let target = tempfile::tempfile().unwrap();
    target.set_len(len).unwrap();
    target
}

fn content(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// Offsets of the 4 KiB pages that the file has in store.
fn stored_pages(file: &File) -> Vec<u64> {
    let mut pages = Vec::new();
    let mut at = 0;
    while let Some(data) = file.next_data(at).unwrap() {
        pages.extend(data.clone().step_by(PAGE));
        at = data.end;
    }
    pages
}

/// Two whole chunks and a page: data at both ends of the first, zeros in the second.
fn golden_memory() -> Vec<u8> {
    let mut bytes = vec![0; 2 * CHUNK + PAGE];
    for page in [0, 15, 32] {
        for (i, byte) in bytes[page * PAGE..(page + 1) * PAGE].iter_mut().enumerate() {
            *byte = (i * 7 + page + i / 256) as u8;
        }
    }
    bytes
}

fn golden_path() -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "golden", "memory-v1"]
        .iter()
        .collect()
}

#[test]
fn a_memory_file_of_format_1_is_read_and_written_as_ever() {
    let file = File::open(golden_path()).unwrap();
    let memory = open(&file).unwrap();
    assert_eq!(
        (memory.save(), memory.memory_len()),
        (save_id(), (2 * CHUNK + PAGE) as u64)
    );
    assert_eq!(
        [0, 1, 2, 3].map(|chunk| memory.data_pages(chunk)),
        [Some(0x8001), Some(0), Some(1), None]
    );
    let target = fresh_target(memory.memory_len());
    memory.load_into(&target, &mut quiet).unwrap();
    assert_eq!(content(&target), golden_memory());
    assert_eq!(
        content(&saved(&Sparse::dense(golden_memory())).0),
        content(&file)
    );
}

#[test]
#[ignore = "makes the golden file for a new format version, when FORKVM_MAKE_GOLDEN is set"]
fn make_golden_memory_file() {
    if std::env::var_os("FORKVM_MAKE_GOLDEN").is_none() {
        return;
    }
    let bytes = content(&saved(&Sparse::dense(golden_memory())).0);
    File::create_new(golden_path())
        .unwrap()
        .write_all(&bytes)
        .unwrap();
}

/// Memory of up to 4 chunks whose pages are zero or not, and the ranges that are announced: at
/// least every page that is not zero, and some that are.
fn any_memory() -> impl Strategy<Value = Sparse> {
    let page = prop_oneof![
        3 => Just(None),
        1 => Just(Some(None)),
        2 => (any::<u8>(), 0..PAGE).prop_map(|filled| Some(Some(filled))),
    ];
    prop::collection::vec(page, 1..64).prop_map(|pages| {
        let mut bytes = vec![0; pages.len() * PAGE];
        let mut data: Vec<Range<u64>> = Vec::new();
        for (index, page) in pages.iter().enumerate() {
            let Some(filled) = page else { continue };
            let start = index * PAGE;
            if let Some((value, at)) = filled {
                bytes[start + at] = *value;
            }
            // Neighbours are announced as one range or as two, both are allowed.
            match data.last_mut() {
                Some(last) if last.end == start as u64 && index % 3 == 0 => {
                    last.end += PAGE as u64;
                }
                _ => data.push(start as u64..(start + PAGE) as u64),
            }
        }
        Sparse { bytes, data }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn any_memory_comes_back_as_it_was_and_zero_pages_are_left_out(source in any_memory()) {
        let (file, written) = saved(&source);
        let memory = open(&file).unwrap();
        memory.verify(&mut quiet).unwrap();
        let target = fresh_target(memory.memory_len());
        memory.load_into(&target, &mut quiet).unwrap();
        prop_assert_eq!(&content(&target), &source.bytes);

        for (index, expected) in source.bytes.chunks(CHUNK).enumerate() {
            let mut chunk = vec![0xaa; expected.len()];
            memory.read_chunk(index as u64, &mut chunk).unwrap();
            prop_assert_eq!(&chunk[..], expected);
        }

        let nonzero: Vec<u64> = (0..source.bytes.len() / PAGE)
            .filter(|page| source.bytes[page * PAGE..][..PAGE].iter().any(|byte| *byte != 0))
            .map(|page| (page * PAGE) as u64)
            .collect();
        prop_assert_eq!(stored_pages(&target), nonzero.clone());
        let in_file: Vec<u64> = stored_pages(&file)
            .into_iter()
            .filter_map(|offset| offset.checked_sub(memory.data_start()))
            .collect();
        prop_assert_eq!(&in_file, &nonzero);
        prop_assert_eq!(written.data, (nonzero.len() * PAGE) as u64);
    }

    #[test]
    fn a_memory_file_that_an_attacker_resealed_never_panics_the_reader(
        changes in prop::collection::vec((0usize..96, any::<u8>()), 1..5),
    ) {
        let file = tempfile::tempfile().unwrap();
        let mut bytes = fs::read(golden_path()).unwrap();
        for (at, value) in changes {
            bytes[at] = value;
        }
        reseal(&mut bytes);
        file.write_all_at(&bytes, 0).unwrap();
        if let Ok(memory) = open(&file) {
            // The golden content is unchanged, so whatever verifies is the golden memory.
            if memory.verify(&mut quiet).is_ok() {
                let target = fresh_target(memory.memory_len());
                memory.load_into(&target, &mut quiet).unwrap();
                prop_assert_eq!(content(&target), golden_memory());
            }
        }
    }
}

/// Puts the right checksums on the header and the table of three chunks.
fn reseal(bytes: &mut [u8]) {
    let table = crc32fast::hash(&bytes[48..72]);
    bytes[40..44].copy_from_slice(&table.to_le_bytes());
    let header = crc32fast::hash(&bytes[..44]);
    bytes[44..48].copy_from_slice(&header.to_le_bytes());
}

#[test]
fn memory_in_a_sparse_file_is_found_by_its_holes() {
    let source = tempfile::tempfile().unwrap();
    source.set_len(64 << 20).unwrap();
    for offset in [0u64, 5 << 20, (64 << 20) - 1] {
        source.write_all_at(&[0x5a], offset).unwrap();
    }
    let (file, written) = saved(&source);
    assert_eq!(
        written,
        Written {
            memory: 64 << 20,
            data: 3 * PAGE as u64
        }
    );
    // st_blocks counts 512 bytes: 3 pages, header, table, and the file system's own.
    let stored = file.metadata().unwrap().blocks() * 512;
    assert!(stored < 256 << 10, "{stored} bytes for 3 pages");
    let target = fresh_target(64 << 20);
    open(&file).unwrap().load_into(&target, &mut quiet).unwrap();
    assert_eq!(content(&target), content(&source));
}

#[test]
fn progress_ends_at_all_of_memory_and_never_goes_back() {
    let mut seen = Vec::new();
    let source = Sparse::dense(golden_memory());
    let file = tempfile::tempfile().unwrap();
    write(&file, save_id(), &source, &mut |progress| {
        seen.push(progress)
    })
    .unwrap();
    let total = source.bytes.len() as u64;
    assert!(seen.is_sorted_by_key(|progress| progress.done), "{seen:?}");
    assert_eq!(seen.last(), Some(&Progress { done: total, total }));
}

/// The smallest memory file: one page.
fn one_page() -> File {
    saved(&Sparse::dense((0..PAGE).map(|i| (i % 251) as u8).collect())).0
}

#[test]
fn every_damaged_byte_is_noticed() {
    let file = saved(&Sparse::dense(golden_memory())).0;
    let bytes = content(&file);
    let meaningful = 48 + 3 * 8;
    for (at, byte) in bytes.iter().enumerate() {
        // Each bit of the header and the table, one bit of each byte of data, and a sample of the
        // zeros, which are all alike.
        let bits = match at {
            _ if at < meaningful => 0..8,
            _ if *byte != 0 || at % 61 == 0 => at % 8..at % 8 + 1,
            _ => continue,
        };
        for bit in bits {
            file.write_all_at(&[byte ^ (1 << bit)], at as u64).unwrap();
            assert!(
                check(&file).is_err(),
                "bit {bit} of byte {at} flipped, and nobody saw it"
            );
        }
        file.write_all_at(&[*byte], at as u64).unwrap();
    }
    check(&file).unwrap();
}

#[test]
fn every_truncation_is_called_a_truncation() {
    let file = one_page();
    let len = file.metadata().unwrap().len();
    for cut in (0..len).rev() {
        file.set_len(cut).unwrap();
        let result = open(&file).map(drop);
        // Less than the magic is foreign, as far as anybody can tell.
        let named = match &result {
            Err(MemoryFault::Truncated { found, .. }) => *found == cut,
            Err(MemoryFault::Foreign) => cut < 8,
            _ => false,
        };
        assert!(named, "cut to {cut} bytes: {result:?}");
    }
}

#[test]
fn an_appended_file_is_refused() {
    let file = one_page();
    let len = file.metadata().unwrap().len();
    file.set_len(len + 1).unwrap();
    assert!(matches!(open(&file), Err(MemoryFault::Trailing { .. })));
}

#[test]
fn damage_in_memory_names_the_chunk_and_both_offsets() {
    let file = saved(&Sparse::dense(golden_memory())).0;
    let memory = open(&file).unwrap();
    let at = memory.data_start() + 2 * CHUNK as u64;
    file.write_all_at(&[0xff; 2], at + 9).unwrap();
    let expected = (2, 2 * CHUNK as u64, at);
    let mut last = vec![0; PAGE];
    let target = fresh_target(memory.memory_len());
    for result in [
        memory.verify(&mut quiet),
        memory.read_chunk(2, &mut last),
        memory.load_into(&target, &mut quiet),
    ] {
        let error = result.unwrap_err();
        assert!(
            error.to_string().starts_with("memory: chunk 2 is damaged"),
            "{error}"
        );
        match error.fault {
            MemoryFault::Chunk {
                chunk,
                memory_offset,
                file_offset,
            } => {
                assert_eq!((chunk, memory_offset, file_offset), expected);
            }
            other => panic!("{other:?}"),
        }
    }
    // The others can still be read: each chunk stands for itself.
    memory.read_chunk(0, &mut vec![0; CHUNK]).unwrap();
}

#[test]
fn data_that_the_file_system_lost_is_noticed() {
    let file = saved(&Sparse::dense(golden_memory())).0;
    let start = open(&file).unwrap().data_start();
    let len = file.metadata().unwrap().len();
    // As after a crash of the host: the length is there, the last blocks are holes.
    file.set_len(start + 2 * CHUNK as u64).unwrap();
    file.set_len(len).unwrap();
    assert!(matches!(
        check(&file),
        Err(MemoryFault::Chunk { chunk: 2, .. })
    ));
}

#[test]
fn what_is_wrong_is_said_by_name() {
    use MemoryFault as F;
    let golden = fs::read(golden_path()).unwrap();
    let put = |at: usize, new: &[u8]| {
        let mut bytes = golden.clone();
        bytes[at..at + new.len()].copy_from_slice(new);
        reseal(&mut bytes);
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&bytes, 0).unwrap();
        check(&file).unwrap_err()
    };
    assert!(matches!(put(0, b"\x7fELF"), F::Foreign));
    assert!(matches!(put(0, b"FORKVM-S"), F::StateFile));
    assert!(matches!(put(8, &[2, 0]), F::Format { found: 2 }));
    assert!(matches!(
        put(10, &[1]),
        F::HeaderField {
            field: "reserved",
            ..
        }
    ));
    assert!(matches!(
        put(12, &[0, 0, 2, 0]),
        F::HeaderField {
            field: "chunk size",
            ..
        }
    ));
    assert!(matches!(put(16, &[1]), F::Length { .. }));
    assert!(matches!(put(16, &[0xff; 8]), F::Length { len: u64::MAX }));
    assert!(matches!(
        put(16, &MAX_LEN.to_le_bytes()),
        F::Truncated { .. }
    ));
    assert!(matches!(
        put(24, &[0; 16]),
        F::HeaderField {
            field: "save id",
            ..
        }
    ));
    // Chunk 1 is zero: it has no checksum. Chunk 2 has one page, not two.
    assert!(matches!(put(60, &[1]), F::TableEntry { chunk: 1 }));
    assert!(matches!(put(64, &[3]), F::TableEntry { chunk: 2 }));
    assert!(matches!(put(50, &[1]), F::TableEntry { chunk: 0 }));
    // A page that the table calls data, but is zero, and the other way round.
    assert!(matches!(put(48, &[3]), F::Chunk { chunk: 0, .. }));
    assert!(matches!(put(49, &[0]), F::Chunk { chunk: 0, .. }));
    assert!(matches!(put(80, &[1]), F::Padding { offset: 80 }));
    assert!(matches!(
        put(2 * CHUNK + 5, &[1]),
        F::Chunk { chunk: 1, .. }
    ));
}

#[test]
fn a_newer_file_is_called_newer_whatever_follows_its_version() {
    let file = one_page();
    file.write_all_at(&[9, 0, 0xee, 0xee, 0xee], 8).unwrap();
    assert!(matches!(open(&file), Err(MemoryFault::Format { found: 9 })));
}

#[test]
fn a_file_whose_writing_failed_is_not_a_memory_file() {
    struct Failing;
    impl MemorySource for Failing {
        fn memory_len(&self) -> io::Result<u64> {
            Ok(4 * CHUNK as u64)
        }
        fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
            into.fill(1);
            if offset < CHUNK as u64 {
                Ok(())
            } else {
                Err(io::Error::other("gone"))
            }
        }
        fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
            Ok(Some(offset..4 * CHUNK as u64))
        }
    }
    let file = tempfile::tempfile().unwrap();
    let fault = write(&file, save_id(), &Failing, &mut quiet).unwrap_err();
    assert!(matches!(fault, MemoryFault::Source { offset, .. } if offset == CHUNK as u64));
    assert!(matches!(open(&file), Err(MemoryFault::Unfinished)));
}

#[test]
fn a_source_that_announces_nonsense_is_refused_rather_than_followed() {
    struct Liar(fn(u64) -> Range<u64>);
    impl MemorySource for Liar {
        fn memory_len(&self) -> io::Result<u64> {
            Ok(4 * CHUNK as u64)
        }
        fn read_at(&self, _: u64, into: &mut [u8]) -> io::Result<()> {
            into.fill(1);
            Ok(())
        }
        fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
            Ok(Some((self.0)(offset)))
        }
    }
    let lies: [fn(u64) -> Range<u64>; 3] =
        [|at| at..at, |_| 0..PAGE as u64, |at| at..5 * CHUNK as u64];
    for lie in lies {
        let fault = write(
            &tempfile::tempfile().unwrap(),
            save_id(),
            &Liar(lie),
            &mut quiet,
        )
        .unwrap_err();
        assert!(matches!(fault, MemoryFault::Extent { .. }), "{fault:?}");
    }
}

#[test]
fn memory_of_an_impossible_size_is_refused() {
    for len in [0, 1, PAGE - 1, PAGE + 1] {
        let source = Sparse::dense(vec![1; len]);
        let result = write(
            &tempfile::tempfile().unwrap(),
            save_id(),
            &source,
            &mut quiet,
        );
        assert!(matches!(result, Err(MemoryFault::Length { len: l }) if l == len as u64));
    }
}

#[test]
fn a_file_with_content_is_not_written_over() {
    let file = one_page();
    let result = write(&file, save_id(), &Sparse::dense(vec![1; PAGE]), &mut quiet);
    assert!(matches!(result, Err(MemoryFault::NotEmpty { .. })));
    check(&file).unwrap();
}

#[test]
fn only_fresh_memory_of_the_right_size_is_loaded_into() {
    let memory = open(&one_page()).unwrap();
    let load = |target: &File| {
        memory
            .load_into(target, &mut quiet)
            .map_err(|error| error.fault)
    };
    assert!(matches!(
        load(&fresh_target(2 * PAGE as u64)),
        Err(MemoryFault::TargetLength {
            expected: 4096,
            found: 8192
        })
    ));
    let used = fresh_target(PAGE as u64);
    used.write_all_at(&[1], 100).unwrap();
    assert!(matches!(
        load(&used),
        Err(MemoryFault::TargetNotEmpty { offset: 0 })
    ));
}

#[test]
fn memory_that_is_not_this_machines_is_refused() {
    let memory = open(&one_page()).unwrap();
    memory.check_len(PAGE as u64).unwrap();
    memory.check_save(save_id()).unwrap();
    assert!(matches!(
        memory.check_len(512 << 20).unwrap_err().fault,
        MemoryFault::OtherLength { expected, found: 4096 } if expected == 512 << 20
    ));
    let other = SaveId::random().unwrap();
    let error = memory.check_save(other).unwrap_err();
    assert!(error.to_string().contains(&other.to_string()), "{error}");
    assert!(
        error.to_string().contains(&save_id().to_string()),
        "{error}"
    );
}

#[test]
fn a_chunk_is_read_only_where_there_is_one_and_into_a_buffer_of_its_length() {
    let memory = open(&one_page()).unwrap();
    let mut whole = vec![0; CHUNK];
    assert!(matches!(
        memory.read_chunk(1, &mut whole).unwrap_err().fault,
        MemoryFault::NoSuchChunk {
            chunk: 1,
            chunks: 1
        }
    ));
    assert!(matches!(
        memory.read_chunk(0, &mut whole).unwrap_err().fault,
        MemoryFault::Buffer {
            expected: 4096,
            found: 65536,
            ..
        }
    ));
}
