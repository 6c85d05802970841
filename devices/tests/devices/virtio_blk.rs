//! virtio-blk as a well-behaved driver knows it.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{fs::File, io};

use forkvm_devices::Device;
use forkvm_devices::block::{Access, BlockLayer, Frozen, Overlay, Presence, RawFile, SECTOR};
use forkvm_devices::virtio::Blk;

use crate::driver::{DATA, DESC, Descriptor, Driver, INDIRECT, VERSION_1, readable, writable};

pub(crate) const SECTORS: u64 = 2048;
pub(crate) const HEADER: u64 = DATA;
pub(crate) const STATUS: u64 = DATA + 0x100;
pub(crate) const BUFFER: u64 = DATA + 0x1000;

pub(crate) const OK: u8 = 0;
pub(crate) const IOERR: u8 = 1;
pub(crate) const UNSUPP: u8 = 2;

pub(crate) const IN: u32 = 0;
pub(crate) const OUT: u32 = 1;
pub(crate) const FLUSH: u32 = 4;
pub(crate) const GET_ID: u32 = 8;
pub(crate) const DISCARD: u32 = 11;
pub(crate) const WRITE_ZEROES: u32 = 13;

const F_RO: u64 = 1 << 5;
const F_FLUSH: u64 = 1 << 9;

/// A disk of zeros that keeps nothing on the host's file system.
pub(crate) fn zero_disk() -> Arc<dyn BlockLayer> {
    struct Zeros;
    impl BlockLayer for Zeros {
        fn len(&self) -> u64 {
            SECTORS * SECTOR
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
        fn presence(&self, offset: u64) -> io::Result<Presence> {
            Ok(Presence {
                present: true,
                len: self.len() - offset,
            })
        }
    }
    Arc::new(Zeros)
}

pub(crate) fn writable_disk() -> Arc<dyn BlockLayer> {
    Arc::new(Overlay::in_memory(zero_disk()))
}

pub(crate) fn driver(layer: Arc<dyn BlockLayer>) -> Driver<Blk> {
    Driver::running(Blk::new(layer, "the-disk"), VERSION_1 | F_FLUSH)
}

impl Driver<Blk> {
    pub(crate) fn put_header(&self, kind: u32, sector: u64) {
        self.put(HEADER, &kind.to_le_bytes());
        self.put(HEADER + 4, &[0; 4]);
        self.put(HEADER + 8, &sector.to_le_bytes());
        self.put(STATUS, &[0xee]);
    }

    /// Has a request with the data buffers `data` served, and returns its status.
    pub(crate) fn blk(&mut self, kind: u32, sector: u64, data: &[Descriptor]) -> u8 {
        self.put_header(kind, sector);
        let mut chain = vec![readable(HEADER, 16)];
        chain.extend_from_slice(data);
        chain.push(writable(STATUS, 1));
        self.request(&chain);
        self.bytes(STATUS, 1)[0]
    }

    fn put_ranges(&self, ranges: &[(u64, u32, u32)]) -> Descriptor {
        for (index, &(sector, sectors, flags)) in ranges.iter().enumerate() {
            let at = BUFFER + 16 * index as u64;
            self.put(at, &sector.to_le_bytes());
            self.put(at + 8, &sectors.to_le_bytes());
            self.put(at + 12, &flags.to_le_bytes());
        }
        readable(BUFFER, 16 * ranges.len() as u32)
    }
}

fn sectors(layer: &dyn BlockLayer, first: u64, count: u64) -> Vec<u8> {
    let mut data = vec![0; (count * SECTOR) as usize];
    layer.read_at(first * SECTOR, &mut data).unwrap();
    data
}

#[test]
fn what_is_written_in_several_segments_is_read_back_in_others() {
    let mut driver = driver(writable_disk());
    let data: Vec<u8> = (0..1024u32).map(|index| (index * 7) as u8).collect();
    driver.put(BUFFER, &data[..100]);
    driver.put(BUFFER + 0x800, &data[100..]);
    let out = [readable(BUFFER, 100), readable(BUFFER + 0x800, 924)];
    assert_eq!(driver.blk(OUT, 9, &out), OK);
    let room = [
        writable(BUFFER + 0x2000, 1),
        writable(BUFFER + 0x3000, 1023),
    ];
    assert_eq!(driver.blk(IN, 9, &room), OK);
    assert_eq!(driver.bytes(BUFFER + 0x2000, 1), data[..1]);
    assert_eq!(driver.bytes(BUFFER + 0x3000, 1023), data[1..]);
    assert_eq!(sectors(driver.device.model().layer().as_ref(), 9, 2), data);

    let counters = driver.device.model().counters();
    assert_eq!((counters.read_requests, counters.read_bytes), (1, 1024));
    assert_eq!(
        (counters.written_requests, counters.written_bytes),
        (1, 1024)
    );
}

#[test]
fn a_transfer_larger_than_the_bounce_buffer_is_whole() {
    let mut driver = driver(writable_disk());
    let len = 0x4_0200;
    let data: Vec<u8> = (0..len as u32)
        .map(|index| (index / 512) as u8 ^ 0x5a)
        .collect();
    driver.put(BUFFER, &data);
    assert_eq!(driver.blk(OUT, 3, &[readable(BUFFER, len as u32)]), OK);
    driver.put(BUFFER, &vec![0; len]);
    assert_eq!(driver.blk(IN, 3, &[writable(BUFFER, len as u32)]), OK);
    assert!(driver.bytes(BUFFER, len) == data);
}

#[test]
fn header_and_status_may_be_split_and_joined_with_data_at_will() {
    let mut driver = driver(writable_disk());
    driver.put_header(OUT, 1);
    driver.put(HEADER + 16, &[0xab; 512]);
    let chain = [
        readable(HEADER, 3),
        readable(HEADER + 3, 9),
        readable(HEADER + 12, 4 + 512),
        writable(STATUS, 1),
    ];
    driver.request(&chain);
    assert_eq!(driver.bytes(STATUS, 1), [OK]);
    driver.put_header(IN, 1);
    assert_eq!(
        driver.request(&[readable(HEADER, 16), writable(BUFFER, 513)]),
        513
    );
    assert_eq!(
        driver.bytes(BUFFER, 513),
        [vec![0xab; 512], vec![OK]].concat()
    );
}

#[test]
fn a_chain_may_stand_in_an_indirect_table() {
    let mut driver = driver(writable_disk());
    driver.put_header(IN, 0);
    let chain = [
        Descriptor {
            flags: 1,
            next: 1,
            ..readable(HEADER, 16)
        },
        Descriptor {
            flags: 3,
            next: 2,
            ..writable(BUFFER, 512)
        },
        writable(STATUS, 1),
    ];
    driver.write_table(BUFFER + 0x8000, &chain);
    let table = Descriptor {
        flags: INDIRECT,
        ..readable(BUFFER + 0x8000, 48)
    };
    driver.write_table(DESC, &[table]);
    driver.offer(0);
    driver.notify();
    assert_eq!(driver.bytes(STATUS, 1), [OK]);
}

#[test]
fn discarded_sectors_read_as_zero_and_their_neighbours_stay() {
    let mut driver = driver(writable_disk());
    driver.put(BUFFER, &[0xcd; 5 * 512]);
    assert_eq!(driver.blk(OUT, 10, &[readable(BUFFER, 5 * 512)]), OK);
    let ranges = driver.put_ranges(&[(11, 1, 0), (13, 1, 0), (20, 0, 0)]);
    assert_eq!(driver.blk(DISCARD, 0, &[ranges]), OK);
    let content = sectors(driver.device.model().layer().as_ref(), 10, 5);
    let firsts: Vec<u8> = content.chunks(512).map(|sector| sector[511]).collect();
    assert_eq!(firsts, [0xcd, 0, 0xcd, 0, 0xcd]);
}

#[test]
fn zeroes_are_written_with_and_without_unmap() {
    for flags in [0, 1] {
        let mut driver = driver(writable_disk());
        driver.put(BUFFER, &[0xcd; 1024]);
        assert_eq!(driver.blk(OUT, 10, &[readable(BUFFER, 1024)]), OK);
        let ranges = driver.put_ranges(&[(11, 1, flags)]);
        assert_eq!(driver.blk(WRITE_ZEROES, 0, &[ranges]), OK);
        let content = sectors(driver.device.model().layer().as_ref(), 10, 2);
        assert_eq!(content, [[0xcd; 512], [0; 512]].concat());
    }
}

#[test]
fn the_id_is_padded_with_zeros() {
    let mut driver = driver(writable_disk());
    assert_eq!(driver.blk(GET_ID, 0, &[writable(BUFFER, 20)]), OK);
    assert_eq!(
        driver.bytes(BUFFER, 20),
        *b"the-disk\0\0\0\0\0\0\0\0\0\0\0\0"
    );
    assert_eq!(driver.blk(GET_ID, 0, &[writable(BUFFER, 19)]), IOERR);
}

#[test]
fn a_read_only_disk_says_so_and_refuses_every_change() {
    let mut driver = driver(zero_disk());
    assert_ne!(driver.offered() & F_RO, 0);
    assert_eq!(driver.blk(OUT, 0, &[readable(BUFFER, 512)]), IOERR);
    let ranges = driver.put_ranges(&[(0, 1, 0)]);
    assert_eq!(driver.blk(DISCARD, 0, &[ranges]), IOERR);
    assert_eq!(driver.blk(WRITE_ZEROES, 0, &[ranges]), IOERR);
    assert_eq!(driver.blk(IN, 0, &[writable(BUFFER, 512)]), OK);
    assert_eq!(driver.blk(FLUSH, 0, &[]), OK);
    assert_eq!(driver.device.model().counters().failed_requests, 3);
}

#[test]
fn the_configuration_tells_the_size_and_the_limits() {
    let mut driver = driver(writable_disk());
    let config = |driver: &mut Driver<Blk>, offset: u64| driver.get(0x100 + offset);
    assert_eq!(config(&mut driver, 0), SECTORS as u32);
    assert_eq!(config(&mut driver, 4), 0);
    assert_eq!(config(&mut driver, 12), 254, "segments");
    assert_eq!(config(&mut driver, 20), 512, "block size");
    assert_eq!(config(&mut driver, 36), 1 << 14, "sectors to discard");
    assert_eq!(config(&mut driver, 48), 1 << 14, "sectors to zero");
    assert_eq!(config(&mut driver, 0xe00), 0, "beyond its end");
    let mut capacity = [0; 8];
    driver.device.read(0x100, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), SECTORS);
}

#[test]
fn without_flush_negotiated_a_write_is_durable_when_it_is_answered() {
    struct Flushes(Arc<dyn BlockLayer>, AtomicUsize);
    impl BlockLayer for Flushes {
        fn len(&self) -> u64 {
            self.0.len()
        }
        fn read_only(&self) -> bool {
            false
        }
        fn read_at(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
            self.0.read_at(offset, data)
        }
        fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
            self.0.write_at(offset, data)
        }
        fn flush(&self) -> io::Result<()> {
            self.1.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
        fn discard(&self, range: Range<u64>) -> io::Result<()> {
            self.0.discard(range)
        }
        fn presence(&self, offset: u64) -> io::Result<Presence> {
            self.0.presence(offset)
        }
    }
    for (features, flushes) in [(VERSION_1, 1), (VERSION_1 | F_FLUSH, 0)] {
        let layer = Arc::new(Flushes(writable_disk(), AtomicUsize::new(0)));
        let mut driver = Driver::running(Blk::new(layer.clone(), ""), features);
        assert_eq!(driver.blk(OUT, 0, &[readable(BUFFER, 512)]), OK);
        assert_eq!(layer.1.load(Ordering::Relaxed), flushes);
    }
}

#[test]
fn a_forked_disk_goes_on_in_its_new_layer() {
    let mut parent = driver(writable_disk());
    parent.put(BUFFER, &[1; 512]);
    assert_eq!(parent.blk(OUT, 0, &[readable(BUFFER, 512)]), OK);
    let base: Arc<dyn BlockLayer> = Arc::new(Frozen::new(parent.device.model().layer().clone()));
    let old = parent
        .device
        .model_mut()
        .swap_layer(Arc::new(Overlay::in_memory(base.clone())));
    parent.put(BUFFER, &[2; 512]);
    assert_eq!(parent.blk(OUT, 0, &[readable(BUFFER, 512)]), OK);
    assert_eq!(sectors(old.as_ref(), 0, 1), [1; 512]);
    assert_eq!(
        sectors(parent.device.model().layer().as_ref(), 0, 1),
        [2; 512]
    );
}

#[test]
fn a_disk_of_another_size_is_named_at_restore() {
    let section = driver(writable_disk()).device.save().unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    File::options()
        .write(true)
        .open(file.path())
        .unwrap()
        .set_len(4096)
        .unwrap();
    let raw = RawFile::open(file.path(), Access::ReadWrite).unwrap();
    let mut other = Driver::new(Blk::new(Arc::new(raw), ""));
    let error = other.device.restore(&section).unwrap_err().to_string();
    assert!(
        error.contains("4096") && error.contains("1048576"),
        "{error}"
    );
}

#[test]
fn a_disk_that_became_read_only_is_named_at_restore() {
    let section = {
        let mut driver = Driver::new(Blk::new(writable_disk(), ""));
        let offered = driver.offered();
        driver.start(offered);
        driver.device.save().unwrap()
    };
    let mut other = Driver::new(Blk::new(zero_disk(), ""));
    let error = other.device.restore(&section).unwrap_err().to_string();
    assert!(error.contains("features"), "{error}");
}

#[test]
fn an_unknown_request_is_unsupported() {
    let mut driver = driver(writable_disk());
    assert_eq!(driver.blk(77, 0, &[writable(BUFFER, 512)]), UNSUPP);
    let ranges = driver.put_ranges(&[(0, 1, 1)]);
    assert_eq!(
        driver.blk(DISCARD, 0, &[ranges]),
        UNSUPP,
        "discard takes no flag"
    );
    let ranges = driver.put_ranges(&[(0, 1, 2)]);
    assert_eq!(driver.blk(WRITE_ZEROES, 0, &[ranges]), UNSUPP);
}
