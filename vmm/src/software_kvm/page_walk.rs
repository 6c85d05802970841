//! The guest's page tables, walked as the CPU walks them (Intel SDM volume 3, section 4.5).
#![allow(unsafe_code)] // Atomic exchange of an entry.

use std::sync::atomic::{AtomicU64, Ordering};

use forkvm_devices::GuestMemory;
use kvm_bindings::kvm_sregs;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::fault::Fault;

pub(super) const PRESENT: u64 = 1;
pub(super) const WRITABLE: u64 = 1 << 1;
pub(super) const USER: u64 = 1 << 2;
pub(super) const ACCESSED: u64 = 1 << 5;
pub(super) const DIRTY: u64 = 1 << 6;
pub(super) const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
/// Address bits of an entry.
pub(super) const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

const CR0_WP: u64 = 1 << 16;
pub(super) const CR4_LA57: u64 = 1 << 12;
const EFER_NXE: u64 = 1 << 11;

/// Bits of a page fault's error code.
const CODE_PRESENT: u32 = 1;
const CODE_WRITE: u32 = 1 << 1;
const CODE_USER: u32 = 1 << 2;
const CODE_FETCH: u32 = 1 << 4;

/// What an address is wanted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    Read,
    Write,
    Fetch,
}

/// Where `address` lies, for an access from ring 3 (`user`) or from a lower one, or the fault that it
/// raises. Accessed and dirty bits are set as by the CPU. Long mode only; keys and SMAP are not looked at.
pub(super) fn translate(
    memory: &GuestMemory,
    sregs: &kvm_sregs,
    address: u64,
    access: Access,
    user: bool,
) -> Result<GuestAddress, Fault> {
    let levels = if sregs.cr4 & CR4_LA57 == 0 { 4 } else { 5 };
    let unused = 64 - (12 + 9 * levels);
    if ((address as i64) << unused >> unused) as u64 != address {
        return Err(Fault::Protection);
    }
    let code = match access {
        Access::Read => 0,
        Access::Write => CODE_WRITE,
        Access::Fetch if sregs.efer & EFER_NXE != 0 => CODE_FETCH,
        Access::Fetch => 0,
    } | if user { CODE_USER } else { 0 };
    let fault = |present| Fault::Page {
        address,
        code: code | present,
    };
    let mut rights = WRITABLE | USER;
    let mut no_execute = 0;
    let mut table = sregs.cr3 & ADDRESS;
    for level in (0..levels).rev() {
        let shift = 12 + 9 * level;
        let at = GuestAddress(table + (address >> shift & 0x1ff) * 8);
        // Tables outside of RAM read as if empty.
        let entry: u64 = memory.read_obj(at).map_err(|_outside| fault(0))?;
        if entry & PRESENT == 0 {
            return Err(fault(0));
        }
        rights &= entry;
        no_execute |= entry & NO_EXECUTE;
        let leaf = level == 0 || (level <= 2 && entry & LARGE != 0);
        let mut marked = entry | ACCESSED;
        if leaf {
            let refused = (user && rights & USER == 0)
                || (access == Access::Write
                    && rights & WRITABLE == 0
                    && (user || sregs.cr0 & CR0_WP != 0))
                || (access == Access::Fetch && no_execute != 0 && sregs.efer & EFER_NXE != 0);
            if refused {
                return Err(fault(CODE_PRESENT));
            }
            if access == Access::Write {
                marked |= DIRTY;
            }
        }
        if marked != entry && !exchange(memory, at, entry, marked).ok_or(fault(0))? {
            // Another vCPU has changed it meanwhile.
            return translate(memory, sregs, address, access, user);
        }
        if leaf {
            let within = (1 << shift) - 1;
            return Ok(GuestAddress(
                (entry & ADDRESS & !within) | (address & within),
            ));
        }
        table = entry & ADDRESS;
    }
    unreachable!("level 0 is a leaf")
}

/// Replaces the entry at `at`, if it is still `old`; `None` outside of RAM. As a CPU, which never writes
/// back an entry that was changed under it.
pub(super) fn exchange(memory: &GuestMemory, at: GuestAddress, old: u64, new: u64) -> Option<bool> {
    let slice = memory.get_slice(at, size_of::<u64>()).ok()?;
    let guard = slice.ptr_guard_mut();
    // SAFETY: eight bytes of RAM that `guard` keeps mapped, aligned as entries are; no Rust reference
    // leads there.
    let entry = unsafe { AtomicU64::from_ptr(guard.as_ptr().cast()) };
    let stored = entry.compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst);
    Some(stored.is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLES: [u64; 4] = [0x1000, 0x2000, 0x3000, 0x4000];
    const PAGE: u64 = 0x5000;
    const AT: u64 = 0xffff_ffff_8000_0123;

    /// Memory whose tables map the page of [`AT`] with `leaf`.
    fn mapped(leaf: u64) -> (GuestMemory, kvm_sregs) {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x8000)]).unwrap();
        for (level, table) in (0..4).rev().zip(TABLES) {
            let entry = match level {
                0 => leaf,
                _ => (table + 0x1000) | PRESENT | WRITABLE | USER,
            };
            let at = table + (AT >> (12 + 9 * level) & 0x1ff) * 8;
            memory.write_obj(entry, GuestAddress(at)).unwrap();
        }
        let sregs = kvm_sregs {
            cr3: TABLES[0],
            cr0: CR0_WP,
            efer: EFER_NXE,
            ..Default::default()
        };
        (memory, sregs)
    }

    fn code(result: Result<GuestAddress, Fault>) -> u32 {
        match result {
            Err(Fault::Page { code, address }) => {
                assert_eq!(address, AT);
                code
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_mapped_page_is_found_and_marked_as_used() {
        let (memory, sregs) = mapped(PAGE | PRESENT | WRITABLE);
        let found = translate(&memory, &sregs, AT, Access::Write, false).unwrap();
        assert_eq!(found, GuestAddress(PAGE + 0x123));
        let at = GuestAddress(TABLES[3] + (AT >> 12 & 0x1ff) * 8);
        let entry: u64 = memory.read_obj(at).unwrap();
        assert_eq!(entry & (ACCESSED | DIRTY), ACCESSED | DIRTY);
    }

    #[test]
    fn what_the_tables_forbid_faults_with_the_cpus_code() {
        let (memory, sregs) = mapped(0);
        let read = translate(&memory, &sregs, AT, Access::Read, true);
        assert_eq!(code(read), CODE_USER);
        let (memory, sregs) = mapped(PAGE | PRESENT | NO_EXECUTE);
        let write = translate(&memory, &sregs, AT, Access::Write, false);
        assert_eq!(code(write), CODE_WRITE | CODE_PRESENT);
        let read = translate(&memory, &sregs, AT, Access::Read, true);
        assert_eq!(code(read), CODE_USER | CODE_PRESENT);
        let fetch = translate(&memory, &sregs, AT, Access::Fetch, false);
        assert_eq!(code(fetch), CODE_FETCH | CODE_PRESENT);
    }

    #[test]
    fn an_address_that_is_not_canonical_is_a_protection_fault() {
        let (memory, sregs) = mapped(PAGE | PRESENT);
        let read = translate(&memory, &sregs, 1 << 47, Access::Read, false);
        assert_eq!(read, Err(Fault::Protection));
    }
}
