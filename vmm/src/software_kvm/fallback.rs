//! Instructions that kernels use in ring 0 and KVM's interpreter lacks.
//!
//! Each is carried out on the registers that KVM shows and on guest memory (Intel SDM volume 2). An
//! instruction that is not here stays KVM's refusal, with its bytes. What needs a whole interpreter is
//! not here either: a kernel that uses SIMD in ring 0 must be built or booted without.

use std::ops::Range;

use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, OpKind};

use super::cpu::Cpu;
use super::fault::Fault;
use super::xsave;
use crate::vcpu::StateError;

/// What became of a refused instruction.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// It, or the exception that it raises, is in the vCPU's state.
    Done {
        /// Lower case, as assemblers write it.
        mnemonic: String,
    },
    /// Not one of those that are known here.
    Unknown {
        /// Its bytes, and some of what follows.
        code: Vec<u8>,
    },
}

const CF: u64 = 1;
const PF: u64 = 1 << 2;
const AF: u64 = 1 << 4;
const ZF: u64 = 1 << 6;
const SF: u64 = 1 << 7;
const OF: u64 = 1 << 11;
const AC: u64 = 1 << 18;

/// How an instruction ends.
enum End {
    /// RIP moves on.
    Retired,
    /// RIP stays.
    Fault(Fault),
    /// RIP moves on, and the exception is raised there.
    Trap(Fault),
    Unknown,
}

/// Carries out the one at RIP.
pub(super) fn instruction(cpu: &mut Cpu<'_>) -> Result<Outcome, StateError> {
    if !cpu.is_in_long_mode() {
        return Ok(Outcome::Unknown { code: Vec::new() });
    }
    let code = match cpu.fetch() {
        Ok(code) => code,
        Err(fault) => {
            fault.raise(cpu.fd)?;
            let mnemonic = "fetch".to_owned();
            return Ok(Outcome::Done { mnemonic });
        }
    };
    let mut decoder = Decoder::with_ip(64, &code, cpu.regs.rip, DecoderOptions::NONE);
    let instruction = decoder.decode();
    match execute(cpu, &instruction)? {
        End::Retired => cpu.retire(&instruction)?,
        End::Fault(fault) => fault.raise(cpu.fd)?,
        End::Trap(fault) => {
            cpu.retire(&instruction)?;
            fault.raise(cpu.fd)?;
        }
        End::Unknown => return Ok(Outcome::Unknown { code }),
    }
    let mnemonic = format!("{:?}", instruction.mnemonic()).to_lowercase();
    Ok(Outcome::Done { mnemonic })
}

fn execute(cpu: &mut Cpu<'_>, instruction: &Instruction) -> Result<End, StateError> {
    use Mnemonic::*;
    let end = match instruction.mnemonic() {
        Int3 => End::Trap(Fault::Breakpoint),
        Ud0 | Ud1 | Ud2 => End::Fault(Fault::InvalidOpcode),
        Clac => {
            cpu.regs.rflags &= !AC;
            End::Retired
        }
        Stac => {
            cpu.regs.rflags |= AC;
            End::Retired
        }
        Cmpxchg16b => compare_exchange(cpu, instruction).into(),
        Popcnt => count_bits(cpu, instruction).into(),
        // A pending x87 exception is raised by the next instruction that computes.
        Wait => End::Retired,
        Fninit | Fnclex | Ldmxcsr | Stmxcsr | Fldcw | Fnstcw => fpu(cpu, instruction)?.into(),
        Xsave | Xsave64 => xsave::save(cpu, instruction, xsave::Form::Standard)?.into(),
        Xsaveopt | Xsaveopt64 => xsave::save(cpu, instruction, xsave::Form::Optimized)?.into(),
        Xsavec | Xsavec64 | Xsaves | Xsaves64 => {
            xsave::save(cpu, instruction, xsave::Form::Compacted)?.into()
        }
        Xrstor | Xrstor64 | Xrstors | Xrstors64 => xsave::restore(cpu, instruction)?.into(),
        _ => End::Unknown,
    };
    Ok(end)
}

impl From<Result<(), Fault>> for End {
    fn from(result: Result<(), Fault>) -> End {
        match result {
            Ok(()) => End::Retired,
            Err(fault) => End::Fault(fault),
        }
    }
}

/// CMPXCHG16B, with or without LOCK: always atomic here.
fn compare_exchange(cpu: &mut Cpu<'_>, instruction: &Instruction) -> Result<(), Fault> {
    let address = cpu.address(instruction, 0).ok_or(Fault::Protection)?;
    if address % 16 != 0 {
        return Err(Fault::Protection);
    }
    let wide = |high: u64, low: u64| u128::from(high) << 64 | u128::from(low);
    let old = wide(cpu.regs.rdx, cpu.regs.rax);
    let new = wide(cpu.regs.rcx, cpu.regs.rbx);
    match cpu.compare_exchange(address, old, new)? {
        Ok(()) => cpu.regs.rflags |= ZF,
        Err(found) => {
            cpu.regs.rflags &= !ZF;
            (cpu.regs.rdx, cpu.regs.rax) = ((found >> 64) as u64, found as u64);
        }
    }
    Ok(())
}

/// POPCNT. Its kin LZCNT and TZCNT never come here: interpreters take them for BSR and BSF.
fn count_bits(cpu: &mut Cpu<'_>, instruction: &Instruction) -> Result<(), Fault> {
    let target = instruction.op0_register();
    let source = if instruction.op1_kind() == OpKind::Register {
        cpu.get(instruction.op1_register())
    } else {
        let address = cpu.address(instruction, 1).ok_or(Fault::Protection)?;
        let mut word = [0; 8];
        cpu.load(address, &mut word[..target.size()])?;
        u64::from_le_bytes(word)
    };
    cpu.set(target, u64::from(source.count_ones()));
    cpu.regs.rflags &= !(CF | PF | AF | ZF | SF | OF);
    if source == 0 {
        cpu.regs.rflags |= ZF;
    }
    Ok(())
}

/// Instructions on the control registers of x87 and SSE. Not by KVM_GET_FPU and KVM_SET_FPU, which leave
/// MXCSR out and do not mark what they change as in use.
fn fpu(cpu: &Cpu<'_>, instruction: &Instruction) -> Result<Result<(), Fault>, StateError> {
    const CONTROL: Range<usize> = 0..2;
    const STATUS: Range<usize> = 2..4;
    /// Control, status, tags, opcode, and both pointers.
    const ENVIRONMENT: Range<usize> = 0..24;
    const EXCEPTIONS: [u8; 2] = 0x80ffu16.to_le_bytes();
    const INITIAL_CONTROL: [u8; 2] = 0x37fu16.to_le_bytes();
    let address = || cpu.address(instruction, 0).ok_or(Fault::Protection);
    let component = match instruction.mnemonic() {
        Mnemonic::Ldmxcsr => xsave::SSE,
        Mnemonic::Fnstcw | Mnemonic::Stmxcsr => 0,
        _ => xsave::X87,
    };
    xsave::change(cpu, component, |area| match instruction.mnemonic() {
        Mnemonic::Fninit => {
            area[ENVIRONMENT].fill(0);
            area[CONTROL].copy_from_slice(&INITIAL_CONTROL);
            Ok(())
        }
        Mnemonic::Fnclex => {
            for (byte, exceptions) in area[STATUS].iter_mut().zip(EXCEPTIONS) {
                *byte &= !exceptions;
            }
            Ok(())
        }
        Mnemonic::Fldcw => cpu.load(address()?, &mut area[CONTROL]),
        Mnemonic::Fnstcw => cpu.store(address()?, &area[CONTROL]),
        Mnemonic::Ldmxcsr => {
            let mut word = [0; 4];
            cpu.load(address()?, &mut word)?;
            if u32::from_le_bytes(word) & !xsave::mxcsr_mask(area) != 0 {
                return Err(Fault::Protection);
            }
            area[xsave::MXCSR].copy_from_slice(&word);
            Ok(())
        }
        _ => cpu.store(address()?, &area[xsave::MXCSR]),
    })
}
