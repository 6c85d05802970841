//! A vCPU between two KVM_RUNs, as an instruction that is carried out here sees it.
#![allow(unsafe_code)] // An atomic compare and exchange on guest memory.

use std::sync::atomic::Ordering;

use forkvm_devices::GuestMemory;
use iced_x86::{Instruction, Register};
use kvm_bindings::{kvm_regs, kvm_sregs};
use kvm_ioctls::VcpuFd;
use portable_atomic::AtomicU128;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::fault::Fault;
use super::page_walk::{Access, translate};
use crate::memory::PAGE;
use crate::vcpu::{StateError, reading, writing};

/// Resume flag: for one instruction.
const RFLAGS_RF: u64 = 1 << 16;

/// See the module's text. Registers are written back by [`Cpu::retire`].
pub(super) struct Cpu<'a> {
    pub(super) fd: &'a VcpuFd,
    memory: &'a GuestMemory,
    pub(super) xsave_size: usize,
    pub(super) regs: kvm_regs,
    pub(super) sregs: kvm_sregs,
}

impl<'a> Cpu<'a> {
    pub(super) fn read(
        fd: &'a VcpuFd,
        memory: &'a GuestMemory,
        xsave_size: usize,
    ) -> Result<Cpu<'a>, StateError> {
        Ok(Cpu {
            fd,
            memory,
            xsave_size,
            regs: fd.get_regs().map_err(reading("REGS"))?,
            sregs: fd.get_sregs().map_err(reading("SREGS"))?,
        })
    }

    /// Goes on behind `instruction`.
    pub(super) fn retire(&mut self, instruction: &Instruction) -> Result<(), StateError> {
        self.regs.rip = instruction.next_ip();
        self.regs.rflags &= !RFLAGS_RF;
        self.fd.set_regs(&self.regs).map_err(writing("REGS"))
    }

    pub(super) fn is_in_long_mode(&self) -> bool {
        self.sregs.cs.l != 0
    }

    fn is_user(&self) -> bool {
        self.sregs.ss.dpl == 3
    }

    /// Where the memory operand of `instruction` lies.
    pub(super) fn address(&self, instruction: &Instruction, operand: u32) -> Option<u64> {
        instruction.virtual_address(operand, 0, |register, _, _| {
            Some(match register {
                Register::FS => self.sregs.fs.base,
                Register::GS => self.sregs.gs.base,
                segment if segment.is_segment_register() => 0,
                register => self.get(register),
            })
        })
    }

    /// Reads memory; the bytes before a fault are read all the same.
    pub(super) fn load(&self, address: u64, bytes: &mut [u8]) -> Result<(), Fault> {
        let mut rest = bytes;
        for (at, len) in pieces(address, rest.len()) {
            let place = translate(self.memory, &self.sregs, at, Access::Read, self.is_user())?;
            let (piece, more) = rest.split_at_mut(len);
            // Device memory, or nothing.
            self.memory
                .read_slice(piece, place)
                .map_err(|_outside| Fault::Protection)?;
            rest = more;
        }
        Ok(())
    }

    /// Writes memory: all of it or, at a fault, none.
    pub(super) fn store(&self, address: u64, bytes: &[u8]) -> Result<(), Fault> {
        let place = |at| translate(self.memory, &self.sregs, at, Access::Write, self.is_user());
        for (at, _len) in pieces(address, bytes.len()) {
            place(at)?;
        }
        let mut rest = bytes;
        for (at, len) in pieces(address, bytes.len()) {
            let (piece, more) = rest.split_at(len);
            self.memory
                .write_slice(piece, place(at)?)
                .map_err(|_outside| Fault::Protection)?;
            rest = more;
        }
        Ok(())
    }

    /// The instruction's bytes, as many as can be fetched, at most 15.
    pub(super) fn fetch(&self) -> Result<Vec<u8>, Fault> {
        let mut code = Vec::new();
        for (at, len) in pieces(self.regs.rip, 15) {
            let found = translate(self.memory, &self.sregs, at, Access::Fetch, self.is_user());
            let place = match found {
                Ok(place) => place,
                // The instruction may end before.
                Err(_fault) if !code.is_empty() => break,
                Err(fault) => return Err(fault),
            };
            let mut piece = vec![0; len];
            self.memory
                .read_slice(&mut piece, place)
                .map_err(|_outside| Fault::Protection)?;
            code.extend(piece);
        }
        Ok(code)
    }

    /// Stores `new` at `address`, which is a multiple of 16, if `old` is there; atomically, also for
    /// other vCPUs. Otherwise returns what is there.
    pub(super) fn compare_exchange(
        &self,
        address: u64,
        old: u128,
        new: u128,
    ) -> Result<Result<(), u128>, Fault> {
        let place = translate(
            self.memory,
            &self.sregs,
            address,
            Access::Write,
            self.is_user(),
        )?;
        let slice = self
            .memory
            .get_slice(GuestAddress(place.0), size_of::<u128>())
            .map_err(|_outside| Fault::Protection)?;
        let guard = slice.ptr_guard_mut();
        let target = guard.as_ptr().cast::<u128>();
        if !AtomicU128::is_lock_free() {
            return Err(Fault::InvalidOpcode);
        }
        // SAFETY: `target` is 16 bytes of RAM that `guard` keeps mapped, aligned since `address` and RAM
        // are. No Rust reference leads there; what the guest or its devices do there meanwhile is a race
        // of the guest's own, as on a CPU.
        let target = unsafe { AtomicU128::from_ptr(target) };
        let stored = target.compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst);
        Ok(stored.map(|_old| ()))
    }

    /// A general register, zero-extended.
    pub(super) fn get(&self, register: Register) -> u64 {
        let whole = match register.full_register() {
            Register::RIP => self.regs.rip,
            whole => place(&mut self.regs.clone(), whole).map_or(0, |word| *word),
        };
        match register.size() {
            1 if is_high(register) => whole >> 8 & 0xff,
            1 => whole & 0xff,
            2 => whole & 0xffff,
            4 => whole & 0xffff_ffff,
            _ => whole,
        }
    }

    /// Sets a general register as an instruction does: a 32-bit one clears the upper half.
    pub(super) fn set(&mut self, register: Register, value: u64) {
        let keep: u64 = match register.size() {
            1 if is_high(register) => !0xff00,
            1 => !0xff,
            2 => !0xffff,
            _ => 0,
        };
        let value = match register.size() {
            1 if is_high(register) => value << 8,
            4 => value & 0xffff_ffff,
            _ => value,
        };
        if let Some(word) = place(&mut self.regs, register.full_register()) {
            *word = *word & keep | value & !keep;
        }
    }
}

/// Where a whole general register is.
fn place(regs: &mut kvm_regs, whole: Register) -> Option<&mut u64> {
    Some(match whole {
        Register::RAX => &mut regs.rax,
        Register::RBX => &mut regs.rbx,
        Register::RCX => &mut regs.rcx,
        Register::RDX => &mut regs.rdx,
        Register::RSI => &mut regs.rsi,
        Register::RDI => &mut regs.rdi,
        Register::RBP => &mut regs.rbp,
        Register::RSP => &mut regs.rsp,
        Register::R8 => &mut regs.r8,
        Register::R9 => &mut regs.r9,
        Register::R10 => &mut regs.r10,
        Register::R11 => &mut regs.r11,
        Register::R12 => &mut regs.r12,
        Register::R13 => &mut regs.r13,
        Register::R14 => &mut regs.r14,
        Register::R15 => &mut regs.r15,
        _ => return None,
    })
}

fn is_high(register: Register) -> bool {
    matches!(
        register,
        Register::AH | Register::BH | Register::CH | Register::DH
    )
}

/// The parts of `address..address + len` that lie in one page each: start and length.
fn pieces(address: u64, len: usize) -> impl Iterator<Item = (u64, usize)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = address.wrapping_add(done as u64);
        let piece = (len - done).min((PAGE - at % PAGE) as usize);
        done += piece;
        (piece > 0).then_some((at, piece))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_access_is_cut_at_page_borders() {
        let cut: Vec<_> = pieces(0x1ff8, 0x1010).collect();
        assert_eq!(cut, [(0x1ff8, 8), (0x2000, 0x1000), (0x3000, 8)]);
        assert_eq!(pieces(0x2000, 0).count(), 0);
    }
}
