use std::mem::offset_of;
use std::sync::Arc;

use forkvm_abi::doorbell::{self as abi, CALLS, Call, PageHeader, call_offset, feature, op, reg};
use forkvm_abi::errno::{EAGAIN, EINVAL, ENOSYS};
use forkvm_devices::device::{GuestCall, GuestOp};
use forkvm_devices::doorbell::{Announcement, Answer};
use forkvm_devices::{Device, DeviceError, Doorbell, Effect, GuestMemory, Section};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use crate::driver::{Line, RAM, all, copy_of, ram, read32, write32};

const FRAME: u32 = 3;
const PAGE: u64 = FRAME as u64 * 4096;
const ALL: u32 =
    feature::FORK | feature::JOIN | feature::SAVE | feature::INTERRUPT | feature::DISCARD;
const LAST_FRAME: u32 = (RAM / 4096) as u32 - 1;
const ME: Announcement = Announcement {
    fork_count: 2,
    clone_id: 5,
    depth: 1,
    generation: [0x77; 16],
};

struct Guest {
    bell: Doorbell,
    memory: GuestMemory,
    line: Arc<Line>,
}

impl Guest {
    fn with(features: u32, memory: GuestMemory) -> Guest {
        let line = Arc::new(Line::default());
        let bell = Doorbell::new(memory.clone(), line.clone(), 4, features);
        Guest { bell, memory, line }
    }

    /// A guest that has a page.
    fn new(features: u32) -> Guest {
        let mut guest = Guest::with(features, ram());
        guest.set_page(FRAME);
        guest
    }

    fn set_page(&mut self, frame: u32) {
        assert_eq!(
            write32(&mut self.bell, reg::PAGE.into(), frame),
            Effect::None
        );
    }

    fn ring(&mut self, slot: u32, op: u32, arg: u32) -> Effect {
        let at = PAGE + call_offset(slot as usize) as u64;
        self.memory.write_obj([op, arg], GuestAddress(at)).unwrap();
        self.memory
            .write_obj(0x5555_i64, GuestAddress(at + 8))
            .unwrap();
        write32(&mut self.bell, reg::RING.into(), slot)
    }

    fn discard(&mut self, slot: u32, frame: u32, pages: u32) -> Effect {
        let at = PAGE + (call_offset(slot as usize) + offset_of!(Call, pages)) as u64;
        self.memory.write_obj(pages, GuestAddress(at)).unwrap();
        self.ring(slot, op::DISCARD, frame)
    }

    fn field<T: vm_memory::ByteValued>(&self, offset: usize) -> T {
        self.memory
            .read_obj(GuestAddress(PAGE + offset as u64))
            .unwrap()
    }

    fn result(&self, slot: usize) -> i64 {
        self.field(call_offset(slot) + offset_of!(Call, result))
    }
}

#[test]
fn the_registers_say_what_the_host_offers() {
    let mut guest = Guest::with(ALL, ram());
    let mut read = |register: u16| read32(&mut guest.bell, register.into());
    assert_eq!(read(reg::MAGIC), abi::MAGIC);
    assert_eq!(read(reg::VERSION), abi::VERSION);
    assert_eq!(read(reg::FEATURES), ALL);
    assert_eq!(read(reg::VCPUS), 4);
    assert_eq!(read(reg::PAGE), 0);
}

#[test]
fn a_new_page_gets_the_identity_at_once() {
    let mut guest = Guest::with(ALL, ram());
    guest.bell.announce(&ME).unwrap();
    guest.set_page(FRAME);
    assert_eq!(read32(&mut guest.bell, reg::PAGE.into()), FRAME);
    assert_eq!(
        guest.field::<u32>(offset_of!(PageHeader, version)),
        abi::VERSION
    );
    assert_eq!(guest.field::<u32>(offset_of!(PageHeader, features)), ALL);
    assert_eq!(guest.field::<u32>(offset_of!(PageHeader, fork_count)), 2);
    assert_eq!(guest.field::<u32>(offset_of!(PageHeader, clone_id)), 5);
    assert_eq!(guest.field::<u32>(offset_of!(PageHeader, depth)), 1);
    assert_eq!(
        guest.field::<[u8; 16]>(offset_of!(PageHeader, generation)),
        [0x77; 16]
    );
}

#[test]
fn a_page_outside_of_ram_is_refused_and_replaces_the_old_one() {
    let mut guest = Guest::new(ALL);
    for frame in [(RAM / 4096) as u32, u32::MAX] {
        guest.set_page(FRAME);
        guest.set_page(frame);
        assert_eq!(read32(&mut guest.bell, reg::PAGE.into()), 0);
        assert_eq!(guest.ring(0, op::FORK, 1), Effect::None);
    }
}

#[test]
fn a_known_call_holds_the_vcpu_until_it_is_answered() {
    let mut guest = Guest::new(ALL);
    let fork = GuestCall {
        slot: 3,
        op: GuestOp::Fork(8),
    };
    assert_eq!(guest.ring(3, op::FORK, 8), Effect::Call(fork));
    assert_eq!(guest.bell.pending(), [fork]);
    assert_eq!(
        guest.result(3),
        0x5555,
        "nothing is written before the answer"
    );

    assert!(guest.bell.answer(
        3,
        Answer {
            result: 7,
            granted: 6,
            ticket: 9
        }
    ));
    assert_eq!(guest.result(3), 7);
    assert_eq!(
        guest.field::<u32>(call_offset(3) + offset_of!(Call, granted)),
        6
    );
    assert_eq!(
        guest.field::<u32>(call_offset(3) + offset_of!(Call, ticket)),
        9
    );
    assert_eq!(guest.bell.pending(), []);
}

#[test]
fn a_call_is_answered_only_once() {
    let mut guest = Guest::new(ALL);
    assert!(!guest.bell.answer(0, Answer::of(1)), "nothing was asked");
    assert!(matches!(guest.ring(0, op::SAVE, 0), Effect::Call(_)));
    assert!(guest.bell.answer(0, Answer::of(1)));
    assert!(!guest.bell.answer(0, Answer::of(2)));
    assert_eq!(guest.result(0), 1);
}

#[test]
fn what_cannot_be_served_is_answered_at_once() {
    let mut guest = Guest::new(ALL);
    assert_eq!(guest.ring(0, 99, 0), Effect::None);
    assert_eq!(guest.result(0), -ENOSYS);
    assert_eq!(guest.ring(1, op::FORK, 0), Effect::None);
    assert_eq!(guest.result(1), -EINVAL);
    assert_eq!(guest.bell.pending(), []);
}

#[test]
fn an_operation_without_its_feature_does_not_exist() {
    for (missing, op) in [
        (feature::FORK, op::FORK),
        (feature::JOIN, op::JOIN),
        (feature::SAVE, op::SAVE),
        (feature::DISCARD, op::DISCARD),
    ] {
        let mut guest = Guest::new(ALL & !missing);
        assert_eq!(guest.ring(0, op, 1), Effect::None);
        assert_eq!(guest.result(0), -ENOSYS);
    }
}

#[test]
fn pages_of_ram_can_be_given_back() {
    for (frame, pages) in [
        (FRAME + 1, 1),
        (FRAME + 1, LAST_FRAME - FRAME),
        (0, FRAME),
        (LAST_FRAME, 1),
    ] {
        let mut guest = Guest::new(ALL);
        let call = GuestCall {
            slot: 2,
            op: GuestOp::Discard { frame, pages },
        };
        assert_eq!(guest.discard(2, frame, pages), Effect::Call(call));
        assert!(guest.bell.answer(2, Answer::of(i64::from(pages))));
        assert_eq!(guest.result(2), i64::from(pages));
    }
}

#[test]
fn what_is_no_ram_cannot_be_given_back() {
    for (frame, pages) in [
        (LAST_FRAME + 1, 1),
        (LAST_FRAME, 2),
        (FRAME + 1, u32::MAX),
        (u32::MAX, 1),
        (u32::MAX, u32::MAX),
    ] {
        let mut guest = Guest::new(ALL);
        assert_eq!(guest.discard(0, frame, pages), Effect::None);
        assert_eq!(guest.result(0), -EINVAL, "{pages} pages from {frame:#x} on");
        assert_eq!(guest.bell.pending(), []);
    }
}

#[test]
fn a_hole_between_two_regions_of_ram_cannot_be_given_back() {
    let regions = [(GuestAddress(0), 0x8000), (GuestAddress(0x9000), 0x8000)];
    let mut guest = Guest::with(ALL, GuestMemory::from_ranges(&regions).unwrap());
    guest.set_page(FRAME);
    assert_eq!(guest.discard(0, 7, 3), Effect::None);
    assert_eq!(guest.result(0), -EINVAL);
    assert!(matches!(guest.discard(0, 9, 8), Effect::Call(_)));
}

#[test]
fn the_page_of_the_doorbell_itself_cannot_be_given_back() {
    for (frame, pages) in [(FRAME, 1), (FRAME - 1, 2), (0, LAST_FRAME), (FRAME, 0)] {
        let mut guest = Guest::new(ALL);
        assert_eq!(guest.discard(0, frame, pages), Effect::None);
        assert_eq!(guest.result(0), -EINVAL, "{pages} pages from {frame} on");
        assert_eq!(guest.bell.pending(), []);
    }
}

#[test]
fn no_pages_cannot_be_given_back() {
    let mut guest = Guest::new(ALL);
    assert_eq!(guest.discard(0, FRAME + 1, 0), Effect::None);
    assert_eq!(guest.result(0), -EINVAL);
}

#[test]
fn a_ring_that_calls_nothing_changes_nothing() {
    let mut guest = Guest::with(ALL, ram());
    assert_eq!(guest.ring(0, op::FORK, 1), Effect::None, "there is no page");
    guest.set_page(FRAME);
    assert!(matches!(guest.ring(0, op::FORK, 1), Effect::Call(_)));
    assert_eq!(
        guest.ring(0, op::SAVE, 0),
        Effect::None,
        "the slot waits for its answer"
    );
    let before = all(&guest.memory);
    for slot in [CALLS as u32, u32::MAX] {
        assert_eq!(
            write32(&mut guest.bell, reg::RING.into(), slot),
            Effect::None
        );
    }
    assert_eq!(
        guest.bell.pending(),
        [GuestCall {
            slot: 0,
            op: GuestOp::Fork(1)
        }]
    );
    assert!(all(&guest.memory) == before);
}

#[test]
fn all_pending_calls_can_be_refused_together() {
    let mut guest = Guest::new(ALL);
    for slot in [0, 7, 31] {
        assert!(matches!(guest.ring(slot, op::JOIN, 1), Effect::Call(_)));
    }
    guest.bell.answer_all_pending(-EAGAIN);
    assert_eq!([0, 7, 31].map(|slot| guest.result(slot)), [-EAGAIN; 3]);
    assert_eq!(guest.bell.pending(), []);
}

#[test]
fn a_fork_interrupts_a_guest_that_asks_for_it() {
    let mut guest = Guest::new(ALL);
    guest.bell.announce(&ME).unwrap();
    assert_eq!(guest.line.edges(), 0, "it did not ask");
    let wanted = PAGE + offset_of!(PageHeader, want_interrupt) as u64;
    guest.memory.write_obj(1u32, GuestAddress(wanted)).unwrap();
    guest.bell.announce(&ME).unwrap();
    assert_eq!(guest.line.edges(), 0, "the fork count is the same");
    guest
        .bell
        .announce(&Announcement {
            fork_count: 3,
            ..ME
        })
        .unwrap();
    assert_eq!(guest.line.edges(), 1);
    assert_eq!(guest.field::<u32>(offset_of!(PageHeader, fork_count)), 3);
}

#[test]
fn a_clone_answers_for_itself_in_its_own_memory() {
    let mut parent = Guest::new(ALL);
    assert!(matches!(parent.ring(2, op::FORK, 1), Effect::Call(_)));
    let section = parent.bell.save().unwrap();

    let mut clone = Guest::with(ALL, copy_of(&parent.memory));
    let before = all(&clone.memory);
    clone.bell.restore(&section).unwrap();
    clone.bell.activate().unwrap();
    assert!(all(&clone.memory) == before, "restoring writes nothing");

    assert!(clone.bell.answer(2, Answer::of(1)));
    clone.bell.announce(&ME).unwrap();
    assert!(parent.bell.answer(2, Answer::of(0)));
    assert_eq!((parent.result(2), clone.result(2)), (0, 1));
    assert_eq!((parent.bell.clone_id(), clone.bell.clone_id()), (0, 5));
}

#[test]
fn an_interrupt_that_may_have_been_lost_is_raised_again() {
    let mut old = Guest::new(ALL);
    let wanted = PAGE + offset_of!(PageHeader, want_interrupt) as u64;
    old.memory.write_obj(1u32, GuestAddress(wanted)).unwrap();
    old.bell.announce(&ME).unwrap();
    let mut new = Guest::with(ALL, copy_of(&old.memory));
    new.bell.restore(&old.bell.save().unwrap()).unwrap();
    assert_eq!(new.line.edges(), 0);
    new.bell.activate().unwrap();
    assert_eq!(new.line.edges(), 1);
}

#[test]
fn a_page_that_is_rubbish_after_a_restore_hurts_nobody() {
    let mut old = Guest::new(ALL);
    assert!(matches!(old.ring(0, op::FORK, 1), Effect::Call(_)));
    let small = GuestMemory::from_ranges(&[(GuestAddress(0), 4096)]).unwrap();
    let mut new = Guest::with(ALL, small);
    new.bell.restore(&old.bell.save().unwrap()).unwrap();
    new.bell.announce(&ME).unwrap();
    assert!(new.bell.answer(0, Answer::of(1)));
    assert_eq!(write32(&mut new.bell, reg::RING.into(), 1), Effect::None);
}

#[test]
fn every_pending_call_comes_back_after_a_restore() {
    let (old, section) = saved_with_every_call();
    let mut new = Guest::with(ALL, copy_of(&old.memory));
    new.bell.restore(&section).unwrap();
    assert_eq!(new.bell.pending(), old.bell.pending());
    assert_eq!(new.bell.pending().len(), 4);
    assert!(new.bell.answer(9, Answer::of(5)));
    assert_eq!(new.result(9), 5);
}

#[test]
fn a_saved_discard_of_what_is_no_ram_here_is_refused() {
    let (_, section) = saved_with_every_call();
    let small = GuestMemory::from_ranges(&[(GuestAddress(0), 4 * 4096)]).unwrap();
    let mut new = Guest::with(ALL, small);
    let error = new.bell.restore(&section).unwrap_err();
    assert!(matches!(error, DeviceError::Inconsistent { .. }), "{error}");
    assert_eq!(new.bell.pending(), []);
}

/// A doorbell in the state of the golden sections, and its section.
fn saved_with_every_call() -> (Guest, Section) {
    let mut guest = Guest::new(ALL);
    let wanted = PAGE + offset_of!(PageHeader, want_interrupt) as u64;
    guest.memory.write_obj(1u32, GuestAddress(wanted)).unwrap();
    guest.bell.announce(&ME).unwrap();
    for (slot, op, arg) in [(0, op::FORK, 8), (3, op::JOIN, 7), (31, op::SAVE, 0)] {
        assert!(matches!(guest.ring(slot, op, arg), Effect::Call(_)));
    }
    assert!(matches!(guest.discard(9, FRAME + 1, 5), Effect::Call(_)));
    let section = guest.bell.save().unwrap();
    (guest, section)
}

/// A section that a doorbell of `version` saved in the state of [`saved_with_every_call`]; that of
/// version 1 knew no DISCARD.
fn golden(version: u16, body: &[u8]) -> Section {
    Section {
        kind: "dev/doorbell".into(),
        version,
        body: body.to_vec(),
    }
}

#[test]
fn a_section_of_version_1_is_read_as_what_it_was() {
    let (old, _) = saved_with_every_call();
    let mut new = Guest::with(ALL, copy_of(&old.memory));
    let golden = golden(1, include_bytes!("../golden/doorbell-v1.cbor"));
    new.bell.restore(&golden).unwrap();
    let mut expected = old.bell.pending();
    expected.retain(|call| !matches!(call.op, GuestOp::Discard { .. }));
    assert_eq!(new.bell.pending(), expected);
    assert_eq!((new.bell.fork_count(), new.bell.clone_id()), (2, 5));
    assert_eq!(read32(&mut new.bell, reg::PAGE.into()), FRAME);
    new.bell.activate().unwrap();
    assert_eq!(new.line.edges(), 1);
}

#[test]
fn a_section_of_version_2_is_what_is_written_today() {
    let (_, section) = saved_with_every_call();
    let golden = golden(2, include_bytes!("../golden/doorbell-v2.cbor"));
    assert_eq!(section, golden);
}

#[test]
fn reports_pass_through() {
    let mut guest = Guest::with(0, ram());
    assert_eq!(
        write32(&mut guest.bell, reg::REPORT.into(), 0x101),
        Effect::Report(0x101)
    );
}

#[test]
fn accesses_of_another_width_are_ignored() {
    let mut guest = Guest::new(ALL);
    for len in [1, 2, 8] {
        let mut data = vec![0xaa; len];
        guest.bell.read(reg::MAGIC.into(), &mut data);
        assert_eq!(data, vec![0; len]);
        assert_eq!(guest.bell.write(reg::REPORT.into(), &data), Effect::None);
    }
}

/// What a guest can do to its doorbell: any write to any register, and any bytes in the page.
#[derive(Clone, Debug)]
enum Act {
    Write { offset: u64, data: Vec<u8> },
    Fill { at: u64, bytes: Vec<u8> },
    Answer { slot: u32 },
    Discard { slot: u32, frame: u32, pages: u32 },
}

fn act() -> impl Strategy<Value = Act> {
    let register = prop_oneof![
        Just(u64::from(reg::RING)),
        Just(u64::from(reg::PAGE)),
        0u64..0x20
    ];
    let word = prop_oneof![0u32..40, any::<u32>()].prop_map(|word| word.to_le_bytes().to_vec());
    let data = prop_oneof![4 => word, 1 => prop::collection::vec(any::<u8>(), 1..9)];
    let write = (register, data).prop_map(|(offset, data)| Act::Write { offset, data });
    let bytes = prop::collection::vec(prop_oneof![0u8..5, any::<u8>()], 1..64);
    let fill = (0u64..4096, bytes).prop_map(|(at, bytes)| Act::Fill { at, bytes });
    let frame = prop_oneof![8 => 0..LAST_FRAME + 4, 1 => any::<u32>()];
    let pages = prop_oneof![8 => 0u32..8, 1 => any::<u32>()];
    let discard = (0..CALLS as u32, frame, pages).prop_map(|(slot, frame, pages)| Act::Discard {
        slot,
        frame,
        pages,
    });
    prop_oneof![
        4 => write,
        2 => fill,
        1 => (0u32..40).prop_map(|slot| Act::Answer { slot }),
        2 => discard,
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Whatever a guest writes: no panic, a call is held exactly when it is pending, nothing
    /// outside of its page changes, and nothing but RAM without its page is ever to be discarded.
    #[test]
    fn no_request_confuses_the_doorbell(acts in prop::collection::vec(act(), 1..60)) {
        let mut guest = Guest::new(ALL);
        for act in acts {
            let pending = guest.bell.pending();
            let before = all(&guest.memory);
            let page = read32(&mut guest.bell, reg::PAGE.into());
            match act {
                Act::Write { offset, data } => match guest.bell.write(offset, &data) {
                    Effect::Call(call) => {
                        prop_assert!((call.slot as usize) < CALLS);
                        prop_assert!(!pending.contains(&call), "rang twice");
                        prop_assert!(guest.bell.pending().contains(&call));
                    }
                    Effect::None | Effect::Report(_) => {
                        prop_assert_eq!(&guest.bell.pending(), &pending);
                    }
                    Effect::Exit(status) => prop_assert!(false, "ended with {}", status),
                },
                Act::Fill { at, bytes } => {
                    let len = bytes.len().min(4096 - at as usize);
                    guest.memory.write_slice(&bytes[..len], GuestAddress(PAGE + at)).unwrap();
                }
                Act::Answer { slot } => {
                    let was = pending.iter().any(|call| call.slot == slot);
                    prop_assert_eq!(guest.bell.answer(slot, Answer::of(7)), was);
                }
                Act::Discard { slot, frame, pages } => {
                    let held = guest.discard(slot, frame, pages) != Effect::None;
                    let now = guest.bell.pending();
                    prop_assert_eq!(held, now.len() > pending.len());
                }
            }
            for call in guest.bell.pending().iter().filter(|call| !pending.contains(call)) {
                if let GuestOp::Discard { frame, pages } = call.op {
                    let end = u64::from(frame) + u64::from(pages);
                    prop_assert!(pages > 0 && end <= u64::from(LAST_FRAME) + 1);
                    prop_assert!(!(u64::from(frame)..end).contains(&u64::from(page)));
                }
            }
            // The page that it has now may be one that it was just given.
            let pages = [FRAME, page, read32(&mut guest.bell, reg::PAGE.into())];
            let in_a_page = |at: usize| pages.contains(&(at as u32 / 4096));
            let after = all(&guest.memory);
            let changed = (0..after.len()).find(|&at| before[at] != after[at] && !in_a_page(at));
            prop_assert_eq!(changed, None);
        }
    }
}
