//! A made-up guest: its page tables, its registers, and what a clone of it has to fetch first.

use std::collections::HashMap;

use kvm_bindings::{KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE, kvm_dtable, kvm_segment};

use super::*;

const RAM: u64 = 1 << 30;
const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
/// Bits of an entry that are no address: no-execute, a protection key, and the ignored ones.
const NOISE: u64 = 0xfff0_0000_0000_0e66;

/// Guest memory: all zero but for these words.
#[derive(Default)]
struct Guest {
    words: HashMap<u64, u64>,
    /// Pages that were read, in order, each time.
    read: Vec<u64>,
}

impl Guest {
    /// Maps `linear` by tables at the given pages, the root first; the last entry points to `page`.
    fn map(&mut self, tables: &[u64], levels: u32, linear: u64, page: u64) {
        for (index, &table) in tables.iter().enumerate() {
            let level = levels - 1 - index as u32;
            let last = index + 1 == tables.len();
            let next = tables.get(index + 1).copied().unwrap_or(page);
            let large = if last && level > 0 { LARGE } else { 0 };
            let slot = table + (linear >> (12 + 9 * level) & 0x1ff) * 8;
            self.words.insert(slot, next | large | NOISE | PRESENT);
        }
    }

    fn named(&mut self, vcpus: &[VcpuState]) -> Vec<u64> {
        named_pages(vcpus, &mut |address| {
            assert!(address.is_multiple_of(8), "{address:#x}");
            self.read.push(address & !(PAGE - 1));
            (address < RAM).then(|| self.words.get(&address).copied().unwrap_or(0))
        })
    }
}

/// Where a vCPU's registers point.
#[derive(Clone, Copy)]
struct Points {
    rip: u64,
    rsp: u64,
    gdt: u64,
    idt: u64,
    tss: u64,
}

impl Points {
    /// All on one page.
    fn at(linear: u64) -> Points {
        Points {
            rip: linear,
            rsp: linear + 0x800,
            gdt: linear,
            idt: linear,
            tss: linear,
        }
    }
}

fn long_mode(cr3: u64, points: Points) -> (kvm_regs, kvm_sregs) {
    let regs = kvm_regs {
        rip: points.rip,
        rsp: points.rsp,
        ..Default::default()
    };
    let table = |base, limit| kvm_dtable {
        base,
        limit,
        ..Default::default()
    };
    let sregs = kvm_sregs {
        cs: kvm_segment {
            l: 1,
            ..Default::default()
        },
        tr: kvm_segment {
            base: points.tss,
            limit: 0x67,
            ..Default::default()
        },
        gdt: table(points.gdt, 0x7f),
        idt: table(points.idt, 0xff),
        cr0: CR0_PG | 1,
        cr3,
        cr4: 1 << 5,
        efer: EFER_LMA | 1 << 8,
        ..Default::default()
    };
    (regs, sregs)
}

fn runnable((regs, sregs): (kvm_regs, kvm_sregs)) -> VcpuState {
    VcpuState::with(KVM_MP_STATE_RUNNABLE, regs, sregs)
}

#[test]
fn the_page_tables_come_in_the_order_of_the_walk_and_the_page_after_them() {
    let mut guest = Guest::default();
    let linear = 0xffff_8012_3456_7000;
    guest.map(&[0x1000, 0x2000, 0x3000, 0x4000], 4, linear, 0xa000);
    // The page below RSP is mapped nowhere: the walk finds the same last table.
    let vcpu = runnable(long_mode(0x1000 | 0x18, Points::at(linear)));
    assert_eq!(
        guest.named(&[vcpu]),
        [0x1000, 0x2000, 0x3000, 0x4000, 0xa000]
    );
}

#[test]
fn five_levels_are_walked_when_cr4_says_so() {
    let mut guest = Guest::default();
    let linear = 0x00ab_cdef_0123_4000;
    let tables = [0x1000, 0x2000, 0x3000, 0x4000, 0x5000];
    guest.map(&tables, 5, linear, 0xa000);
    let (regs, mut sregs) = long_mode(0x1000, Points::at(linear));
    sregs.cr4 |= CR4_LA57;
    assert_eq!(
        guest.named(&[runnable((regs, sregs))]),
        [0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 0xa000]
    );
}

#[test]
fn large_pages_end_the_walk_early_and_name_the_4_kib_that_are_meant() {
    let mut guest = Guest::default();
    // Bit 12 of a large page's entry is its PAT, not an address.
    guest.map(
        &[0x1000, 0x2000, 0x3000],
        4,
        0x4000_0000,
        0x60_0000 | 1 << 12,
    );
    guest.map(&[0x1000, 0x2000], 4, 0x8000_0000, 0);
    let points = Points {
        idt: 0x8000_0000 + 0x1234_5000,
        ..Points::at(0x4000_0000 + 0x12_3000)
    };
    assert_eq!(
        guest.named(&[runnable(long_mode(0x1000, points))]),
        [
            0x1000,
            0x2000,
            0x3000,
            0x60_0000 + 0x12_3000,
            0x60_0000 + 0x12_2000,
            0x1234_5000
        ]
    );
}

#[test]
fn each_register_adds_its_page_and_what_lies_beside_it() {
    let mut guest = Guest::default();
    for page in 0..64 {
        let tables = [0x1000, 0x2000, 0x3000, 0x4000];
        guest.map(&tables, 4, page * PAGE, 0x10_0000 + page * PAGE);
    }
    let page = |index: u64| 0x10_0000 + index * PAGE;
    let points = Points {
        rip: 0x10 * PAGE + 0xf80, // the next instructions are on the next page
        rsp: 0x18 * PAGE,         // an empty stack: the next push goes below
        gdt: 0x20 * PAGE + 0xfc0, // 128 bytes: across the end of its page
        idt: 0x28 * PAGE,
        tss: 0x30 * PAGE,
    };
    let expected = [
        0x10, 0x11, // RIP
        0x17, 0x18, // RSP
        0x20, 0x21, // GDT
        0x28, 0x30, // IDT, TSS
    ];
    let vcpu = runnable(long_mode(0x1000, points));
    assert_eq!(guest.named(&[vcpu])[4..], expected.map(page));
}

#[test]
fn every_page_named_was_read_so_that_it_is_present() {
    let mut guest = Guest::default();
    guest.map(&[0x1000, 0x2000, 0x3000, 0x4000], 4, 0x7000, 0xa000);
    let named = guest.named(&[runnable(long_mode(0x1000, Points::at(0x7000)))]);
    assert!(named.contains(&0xa000));
    assert!(named.iter().all(|page| guest.read.contains(page)));
}

#[test]
fn pages_of_all_vcpus_are_named_each_once() {
    let mut guest = Guest::default();
    guest.map(&[0x1000, 0x2000, 0x3000, 0x4000], 4, 0x7000, 0xa000);
    guest.map(&[0x5000, 0x2000, 0x3000, 0x4000], 4, 0x9000, 0xb000);
    let first = runnable(long_mode(0x1000, Points::at(0x7000)));
    let (regs, sregs) = long_mode(0x5000, Points::at(0x9000));
    let halted = VcpuState::with(KVM_MP_STATE_HALTED, regs, sregs);
    assert_eq!(
        guest.named(&[first, halted]),
        [0x1000, 0x2000, 0x3000, 0x4000, 0xa000, 0x5000, 0xb000]
    );
}

#[test]
fn a_vcpu_that_waits_to_be_started_names_nothing() {
    let mut guest = Guest::default();
    for waits in [KVM_MP_STATE_UNINITIALIZED, KVM_MP_STATE_INIT_RECEIVED] {
        let (regs, sregs) = long_mode(0x1000, Points::at(0x7000));
        let vcpu = VcpuState::with(waits, regs, sregs);
        assert_eq!(guest.named(&[vcpu]), [0u64; 0]);
    }
}

#[test]
fn without_paging_segments_and_offsets_are_physical() {
    let mut guest = Guest::default();
    let (regs, mut sregs) = long_mode(0, Points::at(0x100));
    sregs.cr0 = 1;
    sregs.efer = 0;
    sregs.cs = kvm_segment {
        base: 0x9000,
        ..Default::default()
    };
    sregs.ss.base = 0x2_0000;
    assert_eq!(
        guest.named(&[runnable((regs, sregs))]),
        [0x9000, 0x1_f000, 0x2_0000, 0]
    );
}

#[test]
fn of_32_bit_paging_only_the_page_at_cr3_is_sure() {
    let mut guest = Guest::default();
    let (regs, mut sregs) = long_mode(0x1234_5fe0, Points::at(0x7000));
    sregs.efer = 0;
    assert_eq!(guest.named(&[runnable((regs, sregs))]), [0x1234_5000]);
}

#[test]
fn what_is_not_ram_not_mapped_or_not_canonical_is_passed_over() {
    let mut guest = Guest::default();
    guest.map(&[0x1000, 0x2000, 0x3000, 0x4000], 4, 0x7000, 0xfee0_0000);
    guest.map(&[0x1000, 0x2000, 0x5000], 4, 0x4000_0000, 0x7fff_ffe0_0000);
    let points = Points {
        rsp: 0x4000_0000,
        gdt: 0x4_0000,
        idt: 1 << 47,
        tss: u64::MAX - 8,
        ..Points::at(0x7000)
    };
    assert_eq!(
        guest.named(&[runnable(long_mode(0x1000, points))]),
        [0x1000, 0x2000, 0x3000, 0x4000, 0x5000]
    );
    let beyond = runnable(long_mode(ADDRESS, points));
    assert_eq!(guest.named(&[beyond]), [0u64; 0]);
}

#[test]
fn tables_that_point_to_themselves_end() {
    let mut guest = Guest::default();
    for slot in 0..512 {
        guest.words.insert(0x1000 + 8 * slot, 0x1000 | PRESENT);
    }
    assert_eq!(
        guest.named(&[runnable(long_mode(0x1000, Points::at(0x7000)))]),
        [0x1000]
    );
}
