//! The fork doorbell: how a guest calls its host, and how it learns that it was forked.
//!
//! The layout and the guest's side of it are [`forkvm_abi::doorbell`]'s. The device decodes the
//! ports, takes calls off the guest's page ([`Effect::Call`]) and remembers which are unanswered.
//! It serves no call: the machine's owner does, and answers through [`Doorbell::answer`]. All
//! writes to guest memory happen in a port write of the guest or in a call of the owner; restoring
//! and activating write nothing.

use std::collections::BTreeMap;
use std::mem::offset_of;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use forkvm_abi::doorbell::{self as abi, CALLS, Call, PageHeader, call_offset, feature, reg};
use forkvm_abi::errno;
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::GuestMemory;
use crate::device::{Device, DeviceError, Effect, GuestCall, GuestOp, InterruptLine};
use crate::section::{SavedState, Section, SectionError};

const NAME: &str = "doorbell";
const SECTION: &str = "dev/doorbell";
const PAGE_SIZE: u64 = 4096;

/// The answer to a call of the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// What [`Call::result`] becomes.
    pub result: i64,
    /// What [`Call::granted`] becomes.
    pub granted: u32,
    /// What [`Call::ticket`] becomes.
    pub ticket: u32,
}

impl Answer {
    /// An answer that grants nothing, such as a negated [`errno`].
    pub fn of(result: i64) -> Answer {
        Answer {
            result,
            ..Answer::default()
        }
    }
}

/// Who a VM is after a fork.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Announcement {
    /// Number of forks between this VM and the boot, those included where it was the parent.
    pub fork_count: u32,
    /// 0 in the parent, 1..=n in the clones of the last fork.
    pub clone_id: u32,
    /// Number of clone steps between this VM and the boot.
    pub depth: u32,
    /// What no other VM has.
    #[serde(with = "serde_bytes")]
    pub generation: [u8; 16],
}

/// The doorbell of one machine.
pub struct Doorbell {
    memory: GuestMemory,
    interrupt: Arc<dyn InterruptLine>,
    vcpus: u32,
    features: u32,
    /// Page frame number of the page; 0 is none.
    page: u32,
    /// Calls that were taken and not answered, by slot.
    pending: BTreeMap<u32, GuestOp>,
    identity: Announcement,
    /// An interrupt was raised at some time, so one may be lost on its way when this is saved.
    pulsed: bool,
}

impl Doorbell {
    /// A doorbell without a page. `vcpus` is what the guest reads as their number, `features` are
    /// bits of [`feature`]: calls whose bit is missing are answered with -ENOSYS.
    pub fn new(
        memory: GuestMemory,
        interrupt: Arc<dyn InterruptLine>,
        vcpus: u32,
        features: u32,
    ) -> Doorbell {
        Doorbell {
            memory,
            interrupt,
            vcpus,
            features,
            page: 0,
            pending: BTreeMap::new(),
            identity: Announcement::default(),
            pulsed: false,
        }
    }

    /// Answers the pending call of `slot`; the guest reads the answer when its vCPU goes on.
    /// Returns whether there was such a call: otherwise nothing is written.
    pub fn answer(&mut self, slot: u32, answer: Answer) -> bool {
        let was_pending = self.pending.remove(&slot).is_some();
        if was_pending {
            self.write_answer(slot, answer);
        }
        was_pending
    }

    /// The calls that were not answered yet, in the order of their slots.
    pub fn pending(&self) -> Vec<GuestCall> {
        self.pending
            .iter()
            .map(|(&slot, &op)| GuestCall { slot, op })
            .collect()
    }

    /// Answers every pending call with `result`, granting nothing.
    pub fn answer_all_pending(&mut self, result: i64) {
        while let Some((slot, _)) = self.pending.pop_first() {
            self.write_answer(slot, Answer::of(result));
        }
    }

    /// Tells the VM who it is now: remembers it, writes it to the page if there is one, and raises
    /// the interrupt when the fork count changed, the page asks for it and the host offers it.
    pub fn announce(&mut self, announcement: &Announcement) -> Result<(), DeviceError> {
        let forked = announcement.fork_count != self.identity.fork_count;
        self.identity = *announcement;
        self.write_header();
        if forked && self.features & feature::INTERRUPT != 0 && self.wants_interrupt() {
            self.pulsed = true;
            self.pulse()?;
        }
        Ok(())
    }

    /// Guest-physical address of the guest's page, if it has one.
    pub fn page(&self) -> Option<u64> {
        self.at(0).map(|address| address.0)
    }

    /// The same of a doorbell that was saved as one of these `sections`.
    pub fn saved_page(sections: &[Section]) -> Result<Option<u64>, SectionError> {
        let Some(section) = sections.iter().find(|section| section.kind == SECTION) else {
            return Ok(None);
        };
        let saved: SavedDoorbell = section.decode()?;
        Ok((saved.page != 0).then(|| u64::from(saved.page) * PAGE_SIZE))
    }

    /// Number of forks between this VM and the boot.
    pub fn fork_count(&self) -> u32 {
        self.identity.fork_count
    }

    /// 0 in a VM that was booted or was the parent of its last fork, 1..=n in a clone.
    pub fn clone_id(&self) -> u32 {
        self.identity.clone_id
    }

    /// Number of clone steps between this VM and the boot.
    pub fn depth(&self) -> u32 {
        self.identity.depth
    }

    /// The 16 bytes that no other VM has; zero before the first [`Doorbell::announce`].
    pub fn generation(&self) -> [u8; 16] {
        self.identity.generation
    }

    fn pulse(&self) -> Result<(), DeviceError> {
        self.interrupt
            .pulse()
            .map_err(|source| DeviceError::Interrupt {
                device: NAME.into(),
                source,
            })
    }

    /// Address of `offset` in the page, if there is a page.
    fn at(&self, offset: usize) -> Option<GuestAddress> {
        (self.page != 0).then(|| GuestAddress(u64::from(self.page) * PAGE_SIZE + offset as u64))
    }

    fn set_page(&mut self, frame: u32) {
        let start = GuestAddress(u64::from(frame) * PAGE_SIZE);
        let is_ram = self.memory.check_range(start, PAGE_SIZE as usize);
        if frame != 0 && !is_ram {
            tracing::debug!(
                frame,
                "doorbell: the guest's page is not RAM; it has none now"
            );
        }
        self.page = if is_ram { frame } else { 0 };
        self.write_header();
    }

    /// Takes a call off the page.
    fn ring(&mut self, slot: u32) -> Effect {
        if slot as usize >= CALLS || self.page == 0 || self.pending.contains_key(&slot) {
            let (page, pending) = (self.page, self.pending.contains_key(&slot));
            tracing::debug!(
                slot,
                page,
                pending,
                "doorbell: a ring that calls nothing is ignored"
            );
            return Effect::None;
        }
        let base = call_offset(slot as usize);
        let word = |offset| {
            let at = self.at(base + offset)?;
            self.memory
                .load::<u32>(at, Ordering::Acquire)
                .ok()
                .map(u32::from_le)
        };
        let [Some(op), Some(arg), Some(pages)] = [
            word(offset_of!(Call, op)),
            word(offset_of!(Call, arg)),
            word(offset_of!(Call, pages)),
        ] else {
            tracing::warn!(
                slot,
                "doorbell: the page cannot be read; the call is ignored"
            );
            return Effect::None;
        };
        match self.admit(op, arg, pages) {
            Ok(op) => {
                self.pending.insert(slot, op);
                Effect::Call(GuestCall { slot, op })
            }
            Err(error) => {
                tracing::debug!(slot, op, arg, pages, error, "doorbell: a call is refused");
                self.write_answer(slot, Answer::of(-error));
                Effect::None
            }
        }
    }

    /// Whether a call can be served at all; otherwise the (positive) error number.
    fn admit(&self, op: u32, arg: u32, pages: u32) -> Result<GuestOp, i64> {
        let op = GuestOp::decode(op, arg, pages).ok_or(errno::ENOSYS)?;
        let needed = match op {
            GuestOp::Fork(_) => feature::FORK,
            GuestOp::Join(_) => feature::JOIN,
            GuestOp::Save => feature::SAVE,
            GuestOp::Discard { .. } => feature::DISCARD,
        };
        if self.features & needed == 0 {
            return Err(errno::ENOSYS);
        }
        let valid = match op {
            GuestOp::Fork(clones) => clones > 0,
            GuestOp::Discard { frame, pages } => self.can_discard(self.page, frame, pages),
            GuestOp::Join(_) | GuestOp::Save => true,
        };
        if valid { Ok(op) } else { Err(errno::EINVAL) }
    }

    /// Whether the range holds at least one page, RAM only, and not the doorbell page `page`.
    fn can_discard(&self, page: u32, frame: u32, pages: u32) -> bool {
        let start = GuestAddress(u64::from(frame) * PAGE_SIZE);
        let holds_page = page.checked_sub(frame).is_some_and(|at| at < pages);
        // Two 32-bit numbers of pages: their bytes fit into 64 bits.
        let len = (u64::from(pages) * PAGE_SIZE) as usize;
        pages > 0 && !holds_page && self.memory.check_range(start, len)
    }

    fn wants_interrupt(&self) -> bool {
        self.at(offset_of!(PageHeader, want_interrupt))
            .and_then(|at| self.memory.load::<u32>(at, Ordering::Acquire).ok())
            .is_some_and(|wanted| u32::from_le(wanted) == 1)
    }

    /// Writes an answer. The result goes last: a guest that watches it sees the rest as well.
    fn write_answer(&self, slot: u32, answer: Answer) {
        let base = call_offset(slot as usize);
        self.store(base + offset_of!(Call, granted), answer.granted);
        self.store(base + offset_of!(Call, ticket), answer.ticket);
        if let Some(at) = self.at(base + offset_of!(Call, result)) {
            let written = self
                .memory
                .store(answer.result.to_le(), at, Ordering::Release);
            self.trace_lost(written, at);
        } else {
            tracing::debug!(
                slot,
                "doorbell: the guest took its page away; an answer is lost"
            );
        }
    }

    /// Writes the host's part of the header. The fork count goes last: it is what guests poll.
    fn write_header(&self) {
        self.store(offset_of!(PageHeader, version), abi::VERSION);
        self.store(offset_of!(PageHeader, features), self.features);
        self.store(offset_of!(PageHeader, clone_id), self.identity.clone_id);
        self.store(offset_of!(PageHeader, depth), self.identity.depth);
        if let Some(at) = self.at(offset_of!(PageHeader, generation)) {
            self.trace_lost(self.memory.write_slice(&self.identity.generation, at), at);
        }
        self.store(offset_of!(PageHeader, fork_count), self.identity.fork_count);
    }

    fn store(&self, offset: usize, value: u32) {
        if let Some(at) = self.at(offset) {
            self.trace_lost(self.memory.store(value.to_le(), at, Ordering::Release), at);
        }
    }

    fn trace_lost(&self, written: Result<(), vm_memory::GuestMemoryError>, at: GuestAddress) {
        if let Err(error) = written {
            tracing::warn!(%error, at = at.0, "doorbell: the page cannot be written");
        }
    }
}

impl Device for Doorbell {
    fn name(&self) -> &str {
        NAME
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let value = match u16::try_from(offset).unwrap_or(u16::MAX) {
            reg::MAGIC => abi::MAGIC,
            reg::VERSION => abi::VERSION,
            reg::FEATURES => self.features,
            reg::VCPUS => self.vcpus,
            reg::PAGE => self.page,
            _ => 0,
        };
        match <&mut [u8; 4]>::try_from(&mut *data) {
            Ok(register) => *register = value.to_le_bytes(),
            Err(_) => data.fill(0),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        let Ok(value) = <[u8; 4]>::try_from(data).map(u32::from_le_bytes) else {
            return Effect::None;
        };
        match u16::try_from(offset).unwrap_or(u16::MAX) {
            reg::PAGE => self.set_page(value),
            reg::RING => return self.ring(value),
            reg::REPORT => return Effect::Report(value),
            _ => {}
        }
        Effect::None
    }

    fn save(&self) -> Result<Section, DeviceError> {
        let pending = self
            .pending
            .iter()
            .map(|(&slot, &op)| SavedCall::new(slot, op))
            .collect();
        let saved = SavedDoorbell {
            page: self.page,
            pending,
            identity: self.identity,
            pulsed: self.pulsed,
        };
        Ok(Section::encode(SECTION, &saved)?)
    }

    fn restore(&mut self, section: &Section) -> Result<(), DeviceError> {
        let saved: SavedDoorbell = section.decode()?;
        let valid = |(_, op): &(u32, GuestOp)| match *op {
            // Whoever serves it relies on that, and the section may come from anywhere.
            GuestOp::Discard { frame, pages } => self.can_discard(saved.page, frame, pages),
            _ => true,
        };
        let pending = saved
            .pending
            .iter()
            .map(|call| call.decode().filter(valid))
            .collect::<Option<_>>();
        let pending = pending.ok_or_else(|| DeviceError::Inconsistent {
            device: NAME.into(),
            what: "a pending call is in no slot, asks for an unknown operation, or discards what \
                   is not RAM"
                .into(),
        })?;
        self.page = saved.page;
        self.pending = pending;
        self.identity = saved.identity;
        self.pulsed = saved.pulsed;
        Ok(())
    }

    fn activate(&mut self) -> Result<(), DeviceError> {
        if self.pulsed { self.pulse() } else { Ok(()) }
    }
}

/// What a doorbell needs to go on.
#[derive(Serialize, Deserialize)]
struct SavedDoorbell {
    page: u32,
    pending: Vec<SavedCall>,
    identity: Announcement,
    pulsed: bool,
}

impl SavedState for SavedDoorbell {
    const VERSION: u16 = 2;

    fn upgrade(kind: &str, version: u16, body: &[u8]) -> Result<SavedDoorbell, SectionError> {
        match version {
            1 => SavedDoorbell::from_version_1(kind, body),
            _ => Err(SectionError::Version {
                kind: kind.to_owned(),
                found: version,
                newest: Self::VERSION,
            }),
        }
    }
}

impl SavedDoorbell {
    /// In version 1 a pending call had no number of pages: there was no DISCARD. The other fields
    /// are the same.
    fn from_version_1(kind: &str, body: &[u8]) -> Result<SavedDoorbell, SectionError> {
        ciborium::from_reader(body).map_err(|error| SectionError::Decode {
            kind: kind.to_owned(),
            what: error.to_string(),
        })
    }
}

/// A call that waits for its answer, as the guest wrote it.
#[derive(Serialize, Deserialize)]
struct SavedCall {
    slot: u32,
    op: u32,
    arg: u32,
    /// Since version 2.
    #[serde(default)]
    pages: u32,
}

impl SavedCall {
    fn new(slot: u32, op: GuestOp) -> SavedCall {
        let (op, arg, pages) = match op {
            GuestOp::Fork(clones) => (abi::op::FORK, clones, 0),
            GuestOp::Join(ticket) => (abi::op::JOIN, ticket, 0),
            GuestOp::Save => (abi::op::SAVE, 0, 0),
            GuestOp::Discard { frame, pages } => (abi::op::DISCARD, frame, pages),
        };
        SavedCall {
            slot,
            op,
            arg,
            pages,
        }
    }

    fn decode(&self) -> Option<(u32, GuestOp)> {
        let op = GuestOp::decode(self.op, self.arg, self.pages)?;
        ((self.slot as usize) < CALLS).then_some((self.slot, op))
    }
}
