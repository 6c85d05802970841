//! The fork doorbell: how a guest calls its host, and learns that it was forked.
//!
//! Two halves. A block of 32-bit I/O ports ([`reg`]) is how the guest rings; a page of guest RAM
//! ([`Page`]) is where calls and answers lie. The host never edits a register of a vCPU: every VM
//! of a fork resumes at the same instruction and reads the answer from *its own copy* of the page.
//!
//! A call: fill a free [`Call`] slot of the page, write its index to [`reg::RING`]. The `out`
//! instruction completes, and the vCPU is then held until [`Call::result`] is there, so the guest
//! reads it right after. Slots let every vCPU have a call under way; they are served one after the
//! other. A slot belongs to whoever fills it; one slot per vCPU needs no lock.
//!
//! An unprivileged process can drive this through anything that owns the page and the ports for it.

use core::mem::{offset_of, size_of};

/// First I/O port of the doorbell.
pub const PORT: u16 = 0xf0c0;

/// Number of I/O ports that the doorbell decodes.
pub const PORT_LEN: u16 = 0x20;

/// What [`reg::MAGIC`] reads as; a port that no device decodes reads as all ones.
pub const MAGIC: u32 = u32::from_le_bytes(*b"FKVM");

/// Version of this layout.
pub const VERSION: u32 = 1;

/// Offsets of the 32-bit registers from [`PORT`]. Accesses of another width are ignored.
pub mod reg {
    /// Read: [`super::MAGIC`].
    pub const MAGIC: u16 = 0x00;
    /// Read: [`super::VERSION`].
    pub const VERSION: u16 = 0x04;
    /// Read: bits of [`super::feature`] that this host offers.
    pub const FEATURES: u16 = 0x08;
    /// Read: number of vCPUs of the machine, started or not.
    pub const VCPUS: u16 = 0x0c;
    /// Read and write: page frame number (address / 4096) of the [`super::Page`]; 0 is none.
    /// A frame that is not RAM is refused: the register then reads 0.
    pub const PAGE: u16 = 0x10;
    /// Write: index of a filled [`super::Call`] slot. The vCPU goes on once it is answered.
    pub const RING: u16 = 0x14;
    /// Write: one of [`super::report`], or a value of the guest's own. Never waits.
    pub const REPORT: u16 = 0x18;
}

/// Feature bits of [`reg::FEATURES`] and [`PageHeader::features`].
pub mod feature {
    /// [`super::op::FORK`] is served.
    pub const FORK: u32 = 1 << 0;
    /// [`super::op::JOIN`] is served.
    pub const JOIN: u32 = 1 << 1;
    /// [`super::op::SAVE`] is served.
    pub const SAVE: u32 = 1 << 2;
    /// A fork raises [`crate::slot::DOORBELL_GSI`] in VMs whose page asks for it.
    pub const INTERRUPT: u32 = 1 << 3;
    /// [`super::op::DISCARD`] is served.
    pub const DISCARD: u32 = 1 << 4;
}

/// Values of [`Call::op`].
pub mod op {
    /// Fork this VM into `arg` clones (1 or more). Answers 0 in the parent and 1..=n in the
    /// clones; [`super::Call::granted`] says, in all of them, how many were granted.
    /// -ENOMEM, -ENOSPC, -EBUSY, -EINVAL, -EIO: nothing was forked.
    pub const FORK: u32 = 1;
    /// Wait until every clone of the fork with ticket `arg` has ended. Answers the worst (highest)
    /// of their exit statuses, 0..; -EINVAL for a ticket that was never given, or given twice.
    pub const JOIN: u32 = 2;
    /// Save this machine to disk. Answers 0 in the machine that goes on and 1 in a machine that
    /// was restored from it; -ENOSYS where the host was given no place to save to.
    pub const SAVE: u32 = 3;
    /// Give [`super::Call::pages`] pages of RAM (1 or more) back to the host, from page frame `arg`
    /// on. Answers how many were given back, 0..=pages: one that a vCPU or a device touches
    /// meanwhile may stay as it is. A page that was given back reads as zero until it is written
    /// again; so does one that held nothing, which counts as given back.
    /// -EINVAL, and nothing was given back: a frame of the range is not RAM, or the range holds the
    /// doorbell page. -EAGAIN: the VM was forked or restored meanwhile; ask again.
    pub const DISCARD: u32 = 4;
}

/// Values of [`reg::REPORT`] that have a meaning to the host. Others are the guest program's own.
pub mod report {
    /// A clone runs: written by the first instructions after the fork.
    pub const ACTION: u32 = 1;
    /// The guest program has produced its first result.
    pub const ANSWER: u32 = 2;
    /// A parent has done what its clones will inherit; the host may fork it now.
    pub const READY: u32 = 3;
    /// First value free for a guest program.
    pub const USER: u32 = 0x100;
    /// How many values from there on a guest program may use and have the host count them all.
    pub const DISTINCT: u32 = 1024;
}

/// Number of [`Call`] slots of a page.
pub const CALLS: usize = 32;

/// The doorbell page. The guest zeroes it before it writes [`reg::PAGE`]; the host then fills the
/// header's version, features and identity.
#[repr(C, align(4096))]
#[derive(Clone, Copy, Debug)]
pub struct Page {
    /// Who this VM is, and what it wants to be told.
    pub header: PageHeader,
    /// Calls, each owned by the vCPU or process that fills it.
    pub calls: [Call; CALLS],
    /// Zero; room for later versions.
    pub reserved: [u8; 4096 - size_of::<PageHeader>() - CALLS * size_of::<Call>()],
}

/// First 256 bytes of the [`Page`].
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct PageHeader {
    /// Host: [`VERSION`].
    pub version: u32,
    /// Host: bits of [`feature`].
    pub features: u32,
    /// Host: number of forks that lie between this VM and the boot, counting those where it was
    /// the parent. A guest that polls it sees a fork that the host asked for.
    pub fork_count: u32,
    /// Host: 0 in a VM that was booted or was the parent of its last fork, 1..=n in a clone.
    pub clone_id: u32,
    /// Host: number of clone steps between this VM and the boot.
    pub depth: u32,
    /// Guest: 1 asks for an interrupt when [`Self::fork_count`] changes.
    pub want_interrupt: u32,
    /// Host: 16 bytes that no other VM has; new in each clone.
    pub generation: [u8; 16],
    /// Zero.
    pub reserved: [u8; 256 - 24 - 16],
}

/// One call of the guest to its host.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// Guest: one of [`op`].
    pub op: u32,
    /// Guest: argument of the call.
    pub arg: u32,
    /// Host: the answer; a negative value is a negated [`crate::errno`].
    pub result: i64,
    /// Host: clones that a FORK granted; 0 otherwise.
    pub granted: u32,
    /// Host: what JOIN takes to wait for the clones of this FORK; 0 otherwise and in the clones.
    pub ticket: u32,
    /// Guest: number of pages of a DISCARD; 0 otherwise.
    pub pages: u32,
    /// Zero.
    pub reserved: [u8; 36],
}

/// Offset of [`Page::calls`]`[index]` from the start of the page.
pub const fn call_offset(index: usize) -> usize {
    offset_of!(Page, calls) + index * size_of::<Call>()
}

const _: () = assert!(size_of::<Page>() == 4096);
const _: () = assert!(size_of::<PageHeader>() == 256);
const _: () = assert!(size_of::<Call>() == 64);
const _: () = assert!(offset_of!(Call, result) == 8);
const _: () = assert!(offset_of!(Call, pages) == 24);
const _: () = assert!(offset_of!(PageHeader, generation) == 24);
