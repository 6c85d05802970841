//! Micro benchmarks of what the engine does per fork, per page and per sector.
//!
//!     cargo bench                      # all, 20 s once it is built
//!     cargo bench -- overlay           # by a part of the name
//!
//! Each is here because it is on a path whose whole is measured by `forkvm bench`, and too small there
//! to be seen. They need no KVM.

use std::fs::File;
use std::hint::black_box;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use forkvm::devices::block::{BlockLayer, Overlay, SECTOR};
use forkvm::devices::{Section, Sections};
use forkvm::engine::image::micro::{Filling, Table};
use forkvm::vmm::memory::{self, PAGE};
use forkvm::vmm::memory_file::{self, MemoryFile, MemorySource};
use forkvm::vmm::state_file::{self, SaveId};

const MIB: u64 = 1 << 20;
/// RAM of the guest that `forkvm bench` measures.
const RAM: u64 = 512 * MIB;

/// A state of one vCPU is about 11 KB in a dozen sections: encoded at a save, decoded for a saved
/// machine; the clones of a fork skip both.
fn state_sections(c: &mut Criterion) {
    let mut sections = Sections::default();
    for index in 0..12 {
        let section = Section {
            kind: format!("dev/{index}"),
            version: 1,
            body: vec![index as u8; 900],
        };
        sections.push(section).unwrap();
    }
    let save = SaveId::random().unwrap();
    let file = state_file::encode(&sections, Some(save)).unwrap();
    let mut group = c.benchmark_group("state");
    group.throughput(Throughput::Bytes(file.len() as u64));
    group.bench_function("encode", |b| {
        b.iter(|| state_file::encode(black_box(&sections), Some(save)).unwrap());
    });
    group.bench_function("decode", |b| {
        b.iter(|| state_file::decode(black_box(&file)).unwrap())
    });
    group.finish();
}

/// Every fault looks its page up, and every fork copies the table: here at its worst, a run a page.
fn owner_table(c: &mut Criterion) {
    let pages = 32 * MIB / PAGE;
    let file = memory::memfd(c"micro", pages * PAGE).unwrap();
    let table = Table::scattered(file, pages);
    let mut group = c.benchmark_group("owner-table");
    let mut page = 0;
    group.bench_function("look-up", |b| {
        b.iter(|| {
            page = (page + 4099) % pages;
            table.look_up(black_box(page * PAGE))
        });
    });
    group.bench_function("copy/8192-runs", |b| b.iter(|| table.copy()));
    group.finish();
}

/// A disk that reads as zero; what is measured is the layer above it.
struct Zeros(u64);

impl BlockLayer for Zeros {
    fn len(&self) -> u64 {
        self.0
    }

    fn read_only(&self) -> bool {
        true
    }

    fn read_at(&self, _offset: u64, data: &mut [u8]) -> io::Result<()> {
        data.fill(0);
        Ok(())
    }

    fn write_at(&self, _offset: u64, _data: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, _range: Range<u64>) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn presence(&self, offset: u64) -> io::Result<forkvm::devices::block::Presence> {
        Ok(forkvm::devices::block::Presence {
            present: true,
            len: self.0 - offset,
        })
    }
}

/// Every disk request of a clone goes through its overlay.
fn overlay(c: &mut Criterion) {
    let overlay = Overlay::in_memory(Arc::new(Zeros(RAM)));
    let sectors = RAM / SECTOR;
    let mut data = vec![0x5a; 4096];
    let mut sector = 0;
    // Requests that no read-ahead guesses.
    let mut next = move || {
        sector = (sector + 8 * 40_961) % (sectors - 8);
        sector * SECTOR
    };
    let mut group = c.benchmark_group("overlay");
    group.throughput(Throughput::Bytes(4096));
    group.bench_function("write-4-KiB", |b| {
        b.iter(|| overlay.write_at(next(), &data).unwrap())
    });
    group.bench_function("read-4-KiB", |b| {
        b.iter(|| overlay.read_at(next(), &mut data).unwrap())
    });
    group.finish();
}

/// Memory that is all data.
struct Dense(Vec<u8>);

impl MemorySource for Dense {
    fn memory_len(&self) -> io::Result<u64> {
        Ok(self.0.len() as u64)
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        into.copy_from_slice(&self.0[offset as usize..offset as usize + into.len()]);
        Ok(())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let len = self.0.len() as u64;
        Ok((offset < len).then_some(offset..len))
    }
}

/// A lazily restored machine reads its memory chunk by chunk and believes none without its checksum.
fn memory_file(c: &mut Criterion) {
    let file: File = tempfile::tempfile().unwrap();
    let save = SaveId::random().unwrap();
    let source = Dense((0..16 * MIB).map(|index| (index % 251) as u8).collect());
    memory_file::write(&file, save, &source, &mut |_| {}).unwrap();
    let opened = MemoryFile::open(file, "micro").unwrap();
    let mut chunk = vec![0; memory_file::CHUNK];
    let mut group = c.benchmark_group("memory-file");
    group.throughput(Throughput::Bytes(memory_file::CHUNK as u64));
    let mut index = 0;
    group.bench_function("read-and-check-chunk", |b| {
        b.iter(|| {
            index = (index + 7) % opened.chunks();
            opened.read_chunk(index, &mut chunk).unwrap();
        });
    });
    group.finish();
}

/// What a fault of a lazy clone brings enters the image by one call.
fn image_insert(c: &mut Criterion) {
    if let Err(error) = forkvm::engine::check_userfaultfd() {
        println!("image-insert: skipped: {error}");
        return;
    }
    let chunk = vec![0x5a; 64 << 10];
    let mut group = c.benchmark_group("image-insert");
    group.throughput(Throughput::Bytes(chunk.len() as u64));
    group.bench_function("64-KiB", |b| {
        b.iter_batched_ref(
            || (Filling::empty(MIB).unwrap(), 0),
            |(image, offset)| {
                assert_eq!(image.insert(*offset, &chunk).unwrap(), chunk.len() as u64);
                *offset += chunk.len() as u64;
            },
            BatchSize::PerIteration,
        );
    });
    group.finish();
}

criterion_group! {
    name = micro;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_millis(1500))
        .sample_size(30);
    targets = state_sections, owner_table, overlay, memory_file, image_insert
}
criterion_main!(micro);
