//! virtio-blk under a driver that writes whatever it likes into its memory.

use forkvm_devices::block::SECTOR;
use proptest::prelude::*;

use crate::driver::{
    AVAIL, DATA, DESC, Descriptor, Driver, INDIRECT, NEXT, QUEUE_SIZE, RAM, USED, VERSION_1, WRITE,
    all, readable, reg, writable,
};
use crate::virtio_blk::{
    BUFFER, DISCARD, FLUSH, GET_ID, HEADER, IN, IOERR, OK, OUT, SECTORS, STATUS, UNSUPP,
    WRITE_ZEROES, driver, writable_disk,
};

#[test]
fn requests_that_make_no_sense_end_with_ioerr() {
    let cases: &[(&str, u32, u64, &[Descriptor])] = &[
        ("read beyond the end", IN, SECTORS, &[writable(BUFFER, 512)]),
        (
            "read across the end",
            IN,
            SECTORS - 1,
            &[writable(BUFFER, 1024)],
        ),
        (
            "sector overflow",
            IN,
            u64::MAX / 512 + 1,
            &[writable(BUFFER, 512)],
        ),
        (
            "sector and length overflow",
            IN,
            u64::MAX / 512,
            &[writable(BUFFER, 512)],
        ),
        ("part of a sector", IN, 0, &[writable(BUFFER, 511)]),
        ("nothing to read", IN, 0, &[]),
        ("nothing to write", OUT, 0, &[]),
        ("an empty buffer to write", OUT, 0, &[readable(BUFFER, 0)]),
        (
            "read into a readable buffer",
            IN,
            0,
            &[readable(BUFFER, 512)],
        ),
        (
            "write from a writable buffer",
            OUT,
            0,
            &[writable(BUFFER, 512)],
        ),
        ("buffer outside of RAM", IN, 0, &[writable(RAM, 512)]),
        (
            "buffer across the end of RAM",
            OUT,
            0,
            &[readable(RAM - 256, 512)],
        ),
        (
            "buffer that wraps around",
            OUT,
            0,
            &[readable(u64::MAX - 255, 512)],
        ),
        ("huge buffer", IN, 0, &[writable(BUFFER, u32::MAX - 64)]),
        ("discard of no range", DISCARD, 0, &[]),
        (
            "discard of half a range",
            DISCARD,
            0,
            &[readable(BUFFER, 8)],
        ),
        (
            "discard of too many ranges",
            DISCARD,
            0,
            &[readable(BUFFER + 0x8000, 17 * 16)],
        ),
        ("zeroes without a range", WRITE_ZEROES, 0, &[]),
        ("id without room", GET_ID, 0, &[]),
    ];
    for (what, kind, sector, data) in cases {
        let mut driver = driver(writable_disk());
        assert_eq!(driver.blk(*kind, *sector, data), IOERR, "{what}");
        assert_eq!(driver.blk(FLUSH, 0, &[]), OK, "{what}: the device goes on");
    }
}

#[test]
fn a_discard_beyond_the_end_discards_nothing_of_the_same_request() {
    let mut driver = driver(writable_disk());
    driver.put(BUFFER, &[9; 512]);
    assert_eq!(driver.blk(OUT, 0, &[readable(BUFFER, 512)]), OK);
    driver.put(BUFFER, &0u64.to_le_bytes());
    driver.put(BUFFER + 8, &1u64.to_le_bytes());
    driver.put(BUFFER + 16, &(SECTORS - 1).to_le_bytes());
    driver.put(BUFFER + 24, &2u64.to_le_bytes());
    assert_eq!(driver.blk(DISCARD, 0, &[readable(BUFFER, 32)]), IOERR);
    assert_eq!(driver.blk(IN, 0, &[writable(BUFFER, 512)]), OK);
    assert_eq!(driver.bytes(BUFFER, 512), [9; 512]);
}

#[test]
fn a_request_without_room_for_a_status_comes_back_unanswered() {
    let mut driver = driver(writable_disk());
    driver.put_header(OUT, 0);
    for chain in [
        vec![readable(HEADER, 16)],
        vec![readable(HEADER, 16), readable(BUFFER, 512)],
        vec![readable(HEADER, 16), writable(BUFFER, 0)],
        // More than 2^32 bytes: nothing behind the second buffer counts.
        vec![
            readable(HEADER, 16),
            readable(BUFFER, u32::MAX),
            writable(STATUS, 1),
        ],
    ] {
        assert_eq!(driver.request(&chain), 0);
    }
}

#[test]
fn a_short_header_ends_with_ioerr() {
    let mut driver = driver(writable_disk());
    driver.put_header(FLUSH, 0);
    driver.request(&[readable(HEADER, 15), writable(STATUS, 1)]);
    assert_eq!(driver.bytes(STATUS, 1), [IOERR]);
}

#[test]
fn a_chain_that_is_a_loop_comes_back() {
    let mut driver = driver(writable_disk());
    driver.put_header(IN, 0);
    let looping = [
        Descriptor {
            flags: NEXT,
            next: 1,
            ..readable(HEADER, 16)
        },
        Descriptor {
            flags: NEXT | WRITE,
            next: 1,
            ..writable(BUFFER, 512)
        },
    ];
    driver.write_table(DESC, &looping);
    driver.offer(0);
    driver.notify();
    assert_eq!(driver.used(), 1);
    assert_eq!(driver.blk(FLUSH, 0, &[]), OK);
}

#[test]
fn a_chain_that_promises_more_than_there_is_ends_with_ioerr() {
    let mut driver = driver(writable_disk());
    driver.put_header(FLUSH, 0);
    let cut = [
        Descriptor {
            flags: NEXT,
            next: 1,
            ..readable(HEADER, 16)
        },
        Descriptor {
            flags: NEXT | WRITE,
            next: 500,
            ..writable(STATUS, 1)
        },
    ];
    driver.write_table(DESC, &cut);
    driver.offer(0);
    driver.notify();
    assert_eq!(driver.bytes(STATUS, 1), [IOERR]);
}

#[test]
fn an_indirect_table_of_65535_entries_costs_no_more_than_a_queue() {
    let mut driver = driver(writable_disk());
    let table = Descriptor {
        flags: INDIRECT,
        ..readable(BUFFER, 65535 * 16)
    };
    driver.write_table(DESC, &[table]);
    let link = Descriptor {
        flags: NEXT | WRITE,
        next: 0,
        ..writable(DATA, 0)
    };
    driver.write_table(BUFFER, &[link]);
    driver.offer(0);
    driver.notify();
    assert_eq!(driver.used(), 1);
}

/// An address that is often a good one, often on an edge.
fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => BUFFER..RAM - 0x4000,
        2 => Just(HEADER),
        1 => RAM - 600..RAM + 600,
        1 => any::<u64>(),
        1 => u64::MAX - 600..=u64::MAX,
    ]
}

fn len() -> impl Strategy<Value = u32> {
    prop_oneof![
        3 => Just(512u32),
        2 => Just(16u32),
        2 => 0u32..40,
        1 => 0u32..5000,
        1 => any::<u32>(),
    ]
}

prop_compose! {
    fn descriptor()(
        address in address(), len in len(), flags in 0u16..8, next in 0..QUEUE_SIZE + 2,
    ) -> Descriptor {
        Descriptor { address, len, flags, next }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// Whatever the tables hold: no panic, no byte written outside of a writable buffer or the used
    /// ring, and no change of the disk's size.
    #[test]
    fn no_chain_makes_the_device_write_outside_of_its_buffers(
        table in prop::collection::vec(descriptor(), QUEUE_SIZE as usize),
        indirect in prop::collection::vec(descriptor(), 8),
        heads in prop::collection::vec(0..QUEUE_SIZE, 1..6),
        kind in prop_oneof![Just(IN), Just(OUT), Just(FLUSH), Just(GET_ID), Just(DISCARD),
            Just(WRITE_ZEROES), any::<u32>()],
        sector in prop_oneof![0..SECTORS, any::<u64>()],
    ) {
        let mut driver = driver(writable_disk());
        driver.put_header(kind, sector);
        driver.write_table(BUFFER, &indirect);
        driver.write_table(DESC, &table);
        for &head in &heads {
            driver.offer(head);
        }
        let before = all(&driver.memory);
        driver.notify();
        let after = all(&driver.memory);

        // Indirect tables may be anywhere, also in what a request before has written.
        let allowed = |at: u64| {
            (USED..USED + 0x1000).contains(&at)
                || table.iter().chain(&indirect).any(|descriptor| {
                    descriptor.flags & WRITE != 0
                        && at.checked_sub(descriptor.address)
                            .is_some_and(|offset| offset < u64::from(descriptor.len))
                })
        };
        let uses_foreign_tables = table.iter().any(|descriptor| {
            descriptor.flags & INDIRECT != 0 && descriptor.address != BUFFER
        });
        if !uses_foreign_tables && before[BUFFER as usize..][..128] == after[BUFFER as usize..][..128]
        {
            for at in 0..RAM {
                if before[at as usize] != after[at as usize] {
                    prop_assert!(allowed(at), "{at:#x} was written");
                }
            }
        }
        prop_assert_eq!(driver.device.model().layer().len(), SECTORS * SECTOR);
        if driver.get(reg::STATUS) & 0x40 == 0 {
            prop_assert_eq!(usize::from(driver.used()), heads.len(), "every request came back");
        }
    }

    /// A chain with a good status byte always gets a status that the driver knows.
    #[test]
    fn a_status_is_always_one_of_three(
        kind in prop_oneof![0u32..16, any::<u32>()],
        sector in prop_oneof![0..SECTORS, any::<u64>()],
        data in prop::collection::vec((address(), len(), any::<bool>()), 0..5),
        noise in any::<[u8; 64]>(),
    ) {
        let mut driver = driver(writable_disk());
        driver.put(BUFFER, &noise);
        let data: Vec<_> = data
            .into_iter()
            .map(|(address, len, write)| {
                if write { writable(address, len) } else { readable(address, len) }
            })
            .collect();
        let status = driver.blk(kind, sector, &data);
        let in_order = data.windows(2).all(|pair| pair[0].flags <= pair[1].flags);
        let in_ram = data.iter().all(|descriptor| {
            descriptor.len == 0
                || descriptor.address.checked_add(descriptor.len.into()).is_some_and(|end| end <= RAM)
        });
        if in_order && in_ram {
            prop_assert!([OK, IOERR, UNSUPP].contains(&status), "{status:#x}");
        }
    }

    /// Rings themselves are guest memory, too.
    #[test]
    fn no_ring_content_makes_the_device_fail(
        rings in prop::collection::vec(any::<u8>(), 0x80),
        features in prop_oneof![Just(VERSION_1), Just(VERSION_1 | 1 << 29 | 1 << 28)],
    ) {
        let mut driver = Driver::running(
            forkvm_devices::virtio::Blk::new(writable_disk(), ""), features,
        );
        driver.put(AVAIL, &rings);
        driver.put(DESC, &rings);
        driver.put(USED, &rings);
        driver.notify();
        driver.start(VERSION_1);
        prop_assert_eq!(driver.blk(IN, 0, &[writable(BUFFER, 512)]), OK);
    }
}
