//! Which pages of guest memory a saved vCPU will touch first.
//!
//! A clone whose memory is fetched when it is touched would wait for these pages one after the
//! other, and each level of its page tables hides the next one. So the clone engine asks for them
//! ahead, by the registers in the saved state. This module walks the guest's page tables (Intel SDM
//! volume 3, chapter "Paging") and fetches nothing itself: whoever calls says how a word is read.
//!
//! It is a hint. What a guest does next is the guest's business, so nothing here is an error.

use std::collections::HashSet;
use std::ops::Range;

use kvm_bindings::{KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_UNINITIALIZED, kvm_regs, kvm_sregs};

use super::VcpuState;
use crate::memory::PAGE;

const CR0_PG: u64 = 1 << 31;
const CR4_LA57: u64 = 1 << 12;
const EFER_LMA: u64 = 1 << 10;

const ENTRY_PRESENT: u64 = 1 << 0;
/// In an entry of the second and third level: it maps a page, not a table.
const ENTRY_PAGE_SIZE: u64 = 1 << 7;
/// The physical address in an entry, or in CR3: bits 12 to 51.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// With fewer bytes than this left on the page of RIP, the next page counts as well.
const SOON: u64 = 256;

/// Bytes of a TSS that the CPU reads when it changes to the kernel's stack (SDM volume 3, "64-Bit
/// Task Management"). The I/O bitmap behind them is seldom read.
const TSS_LEN: u64 = 104;

/// The guest-physical pages that `vcpus` name and that their first instructions will
/// touch: the page tables on the way to RIP, RSP, GDT, IDT and TSS, and those places themselves.
/// Each page once, as the address of its first byte, in the order in which they were found; a vCPU
/// has at most 60. A vCPU that waits for its INIT or SIPI names none.
///
/// `read` returns the 64-bit little-endian word at a guest-physical address, a multiple of 8, or
/// `None` where there is no RAM. It is called for every page of the list (the first word, where it
/// is not a page table) and may make that page present. It is up to the guest which addresses are
/// asked for.
///
/// Page tables of 4 and 5 levels are walked, with pages of 4 KiB, 2 MiB and 1 GiB. With paging off
/// an address is physical. In other modes (32-bit and PAE paging) only the page at CR3 is sure.
///
/// The doorbell page and the pages of devices' queues are no vCPU's, and not in the list.
pub(crate) fn named_pages(
    vcpus: &[VcpuState],
    read: &mut dyn FnMut(u64) -> Option<u64>,
) -> Vec<u64> {
    let mut found = Found {
        read,
        pages: Vec::new(),
        seen: HashSet::new(),
    };
    for vcpu in vcpus {
        let waits = [KVM_MP_STATE_UNINITIALIZED, KVM_MP_STATE_INIT_RECEIVED];
        if !waits.contains(&vcpu.mp_state()) {
            found.add_vcpu(vcpu.regs(), vcpu.sregs());
        }
    }
    found.pages
}

/// The pages found so far, and how to look further.
struct Found<'a> {
    read: &'a mut dyn FnMut(u64) -> Option<u64>,
    pages: Vec<u64>,
    seen: HashSet<u64>,
}

impl Found<'_> {
    fn add_vcpu(&mut self, regs: &kvm_regs, sregs: &kvm_sregs) {
        let Some(mode) = Mode::of(sregs) else {
            // The walk begins there, whatever it finds.
            self.word(sregs.cr3 & u64::from(u32::MAX) & ADDRESS);
            return;
        };
        let rip = mode.linear(sregs.cs.base, regs.rip);
        let rsp = mode.linear(sregs.ss.base, regs.rsp);
        self.add_linear(mode, rip..rip.saturating_add(SOON));
        // A push begins below RSP, where it is the end of a page; calls go further down.
        self.add_linear(mode, rsp.saturating_sub(PAGE)..rsp.saturating_add(1));
        for table in [sregs.gdt, sregs.idt] {
            let len = PAGE.min(u64::from(table.limit) + 1);
            self.add_linear(mode, table.base..table.base.saturating_add(len));
        }
        self.add_linear(mode, sregs.tr.base..sregs.tr.base.saturating_add(TSS_LEN));
    }

    /// Adds the pages of a range of linear addresses, and the tables on the way there.
    fn add_linear(&mut self, mode: Mode, range: Range<u64>) {
        for page in (range.start & !(PAGE - 1)..range.end).step_by(PAGE as usize) {
            if let Some(physical) = self.translate(mode, page)
                && !self.seen.contains(&physical)
            {
                self.word(physical);
            }
        }
    }

    /// The physical page of the linear page `linear`; `None` where the guest has mapped none.
    fn translate(&mut self, mode: Mode, linear: u64) -> Option<u64> {
        let Mode::Long { levels, root, .. } = mode else {
            return Some(linear);
        };
        let unused = 64 - (12 + 9 * levels);
        if (linear << unused) as i64 >> unused != linear as i64 {
            return None; // not canonical
        }
        let mut table = root;
        for level in (0..levels).rev() {
            let shift = 12 + 9 * level;
            let entry = self.word(table + (linear >> shift & 0x1ff) * 8)?;
            if entry & ENTRY_PRESENT == 0 {
                return None;
            }
            let is_page = level == 0 || (level <= 2 && entry & ENTRY_PAGE_SIZE != 0);
            if is_page {
                let within = (1 << shift) - 1;
                return Some(entry & ADDRESS & !within | linear & within);
            }
            table = entry & ADDRESS;
        }
        None
    }

    /// Reads the word at `address`, and lists its page when it is RAM.
    fn word(&mut self, address: u64) -> Option<u64> {
        let word = (self.read)(address)?;
        let page = address & !(PAGE - 1);
        if self.seen.insert(page) {
            self.pages.push(page);
        }
        Some(word)
    }
}

/// How a vCPU's addresses become physical ones.
#[derive(Clone, Copy, Debug)]
enum Mode {
    /// Paging is off: addresses of 32 bits, added to their segment.
    Unpaged,
    /// Long mode.
    Long {
        /// 4 or 5.
        levels: u32,
        /// Physical address of the first table.
        root: u64,
        /// The code segment is one of 64 bits: segments have no base, addresses no 32-bit end.
        flat: bool,
    },
}

impl Mode {
    /// `None` for modes that are not walked.
    fn of(sregs: &kvm_sregs) -> Option<Mode> {
        if sregs.cr0 & CR0_PG == 0 {
            return Some(Mode::Unpaged);
        }
        (sregs.efer & EFER_LMA != 0).then_some(Mode::Long {
            levels: if sregs.cr4 & CR4_LA57 != 0 { 5 } else { 4 },
            root: sregs.cr3 & ADDRESS,
            flat: sregs.cs.l != 0,
        })
    }

    /// The linear address of `offset` in a segment that begins at `base`.
    fn linear(self, base: u64, offset: u64) -> u64 {
        match self {
            Mode::Long { flat: true, .. } => offset,
            _ => base.wrapping_add(offset) & u64::from(u32::MAX),
        }
    }
}

#[cfg(test)]
mod tests;
