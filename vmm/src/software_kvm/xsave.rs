//! XSAVE and its kin (Intel SDM volume 1, chapter 13), on the area that KVM keeps for a vCPU.
//!
//! KVM's area has the standard form; the guest's may be compacted, with components one behind the other.

use std::arch::x86_64::__cpuid_count;
use std::ops::Range;
use std::sync::LazyLock;

use iced_x86::Instruction;

use super::cpu::Cpu;
use super::fault::Fault;
use crate::vcpu::{StateError, get_xsave, reading, reading_io, set_xsave, writing_io};

pub(super) const X87: u64 = 1;
pub(super) const SSE: u64 = 1 << 1;
const AVX: u64 = 1 << 2;
/// Bit of XCOMP_BV: the area is compacted.
const COMPACTED: u64 = 1 << 63;

// Parts of the legacy area, in bytes.
const X87_REGISTERS: [Range<usize>; 2] = [0..24, 32..160];
pub(super) const MXCSR: Range<usize> = 24..28;
const MXCSR_AND_MASK: Range<usize> = 24..32;
const SSE_REGISTERS: Range<usize> = 160..416;
const XSTATE_BV: Range<usize> = 512..520;
const XCOMP_BV: Range<usize> = 520..528;
const RESERVED: Range<usize> = 528..576;
const HEADER: Range<usize> = 512..576;
const INITIAL_MXCSR: [u8; 4] = 0x1f80u32.to_le_bytes();
/// Where extended components begin.
const EXTENDED: usize = 576;

/// Changes KVM's area of a vCPU, after which `components` of it are in use.
pub(super) fn change(
    cpu: &Cpu<'_>,
    components: u64,
    change: impl FnOnce(&mut [u8]) -> Result<(), Fault>,
) -> Result<Result<(), Fault>, StateError> {
    let mut area = get_xsave(cpu.fd, cpu.xsave_size).map_err(reading_io("XSAVE"))?;
    if let Err(fault) = change(&mut area) {
        return Ok(Err(fault));
    }
    let state = word(&area, XSTATE_BV) | components;
    area[XSTATE_BV].copy_from_slice(&state.to_le_bytes());
    set_xsave(cpu.fd, cpu.xsave_size, &area).map_err(writing_io("XSAVE"))?;
    Ok(Ok(()))
}

/// Which of the instructions that save.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// XSAVE: every component that is asked for.
    Standard,
    /// XSAVEOPT: the same, but of those in their initial state.
    Optimized,
    /// XSAVEC, XSAVES: the same, one behind the other.
    Compacted,
}

/// A component of 2 and above: where it lies in the standard form.
struct Component {
    bit: u64,
    standard: Range<usize>,
    /// Starts at a multiple of 64 in the compacted form.
    aligned: bool,
}

/// All that the CPU has. Asked once: in a virtual machine CPUID is an exit to its host.
static COMPONENTS: LazyLock<Vec<Component>> = LazyLock::new(|| {
    let known = |index: u32| {
        let leaf = __cpuid_count(0xd, index);
        let start = leaf.ebx as usize;
        Component {
            bit: 1 << index,
            standard: start..start + leaf.eax as usize,
            aligned: leaf.ecx & 2 != 0,
        }
    };
    let there = |component: &Component| !component.standard.is_empty();
    (2..63).map(known).filter(there).collect()
});

/// Those in `mask` that the CPU has.
fn components(mask: u64) -> impl Iterator<Item = &'static Component> {
    COMPONENTS
        .iter()
        .filter(move |component| component.bit & mask != 0)
}

/// The same, each with where it lies in an area of `mask` of this form.
fn placed(mask: u64, compacted: bool) -> Vec<(&'static Component, Range<usize>)> {
    let mut next = EXTENDED;
    let place = |component: &'static Component| {
        if !compacted {
            let range = component.standard.clone();
            return (component, range);
        }
        if component.aligned {
            next = next.next_multiple_of(64);
        }
        let range = next..next + component.standard.len();
        next = range.end;
        (component, range)
    };
    components(mask).map(place).collect()
}

fn word(area: &[u8], range: Range<usize>) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&area[range]);
    u64::from_le_bytes(word)
}

/// What both directions begin with.
struct Operands {
    /// The guest's area.
    address: u64,
    /// Components that are asked for and enabled.
    asked: u64,
    /// Those that are enabled.
    enabled: u64,
}

fn operands(
    cpu: &Cpu<'_>,
    instruction: &Instruction,
) -> Result<Result<Operands, Fault>, StateError> {
    let xcrs = cpu.fd.get_xcrs().map_err(reading("XCRS"))?;
    let enabled = xcrs.xcrs[0].value;
    let asked = cpu.regs.rdx << 32 | cpu.regs.rax & 0xffff_ffff;
    Ok(match cpu.address(instruction, 0) {
        Some(address) if address % 64 == 0 => Ok(Operands {
            address,
            asked: asked & enabled,
            enabled,
        }),
        _ => Err(Fault::Protection),
    })
}

/// The components of KVM's area that are not in their initial state. MXCSR has no bit of its own: it
/// is told, and kept by KVM, with that of SSE.
fn in_use(has: &[u8]) -> u64 {
    let sse = if has[MXCSR] == INITIAL_MXCSR { 0 } else { SSE };
    word(has, XSTATE_BV) | sse
}

/// Bits of MXCSR that may be set, as KVM's area says (Intel SDM volume 1, section 11.6.6).
pub(super) fn mxcsr_mask(has: &[u8]) -> u32 {
    let mut mask = [0; 4];
    mask.copy_from_slice(&has[28..32]);
    match u32::from_le_bytes(mask) {
        0 => 0xffbf,
        mask => mask,
    }
}

/// Writes components to memory.
pub(super) fn save(
    cpu: &Cpu<'_>,
    instruction: &Instruction,
    form: Form,
) -> Result<Result<(), Fault>, StateError> {
    let operands = match operands(cpu, instruction)? {
        Ok(operands) => operands,
        Err(fault) => return Ok(Err(fault)),
    };
    let has = get_xsave(cpu.fd, cpu.xsave_size).map_err(reading_io("XSAVE"))?;
    Ok(save_area(cpu, &operands, &has, form))
}

fn save_area(cpu: &Cpu<'_>, operands: &Operands, has: &[u8], form: Form) -> Result<(), Fault> {
    let Operands { address, asked, .. } = *operands;
    let in_use = in_use(has);
    let written = match form {
        Form::Standard => asked,
        Form::Optimized | Form::Compacted => asked & in_use,
    };
    let compacted = form == Form::Compacted;
    let places = placed(asked, compacted);
    let len = places.iter().map(|(_, range)| range.end).max();
    let mut area = vec![0; len.unwrap_or(EXTENDED)];
    // What is not saved stays as it is.
    cpu.load(address, &mut area)?;
    let mut copy = |to: Range<usize>, from: Range<usize>| area[to].copy_from_slice(&has[from]);
    if written & X87 != 0 {
        X87_REGISTERS
            .into_iter()
            .for_each(|range| copy(range.clone(), range));
    }
    if written & SSE != 0 {
        copy(SSE_REGISTERS, SSE_REGISTERS);
    }
    if asked & (SSE | AVX) != 0 {
        copy(MXCSR_AND_MASK, MXCSR_AND_MASK);
    }
    for (component, range) in places {
        if written & component.bit != 0 {
            copy(range, component.standard.clone());
        }
    }
    let before = if compacted { 0 } else { word(&area, XSTATE_BV) };
    let state = before & !asked | asked & in_use;
    area[XSTATE_BV].copy_from_slice(&state.to_le_bytes());
    if compacted {
        area[XCOMP_BV].copy_from_slice(&(asked | COMPACTED).to_le_bytes());
    }
    cpu.store(address, &area)
}

/// Reads components from memory, in the form that the area says.
pub(super) fn restore(
    cpu: &Cpu<'_>,
    instruction: &Instruction,
) -> Result<Result<(), Fault>, StateError> {
    let operands = match operands(cpu, instruction)? {
        Ok(operands) => operands,
        Err(fault) => return Ok(Err(fault)),
    };
    let mut has = get_xsave(cpu.fd, cpu.xsave_size).map_err(reading_io("XSAVE"))?;
    if let Err(fault) = restore_area(cpu, &operands, &mut has) {
        return Ok(Err(fault));
    }
    match set_xsave(cpu.fd, cpu.xsave_size, &has) {
        // What the checks here let through and KVM does not: programs can make such areas.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(Err(Fault::Protection)),
        other => Ok(Ok(other.map_err(writing_io("XSAVE"))?)),
    }
}

fn restore_area(cpu: &Cpu<'_>, operands: &Operands, has: &mut [u8]) -> Result<(), Fault> {
    const INITIAL_FCW: [u8; 2] = 0x37fu16.to_le_bytes();
    let Operands {
        address,
        asked,
        enabled,
    } = *operands;
    let mut area = vec![0; EXTENDED];
    cpu.load(address, &mut area)?;
    let stored = word(&area, XSTATE_BV);
    let layout = word(&area, XCOMP_BV);
    let compacted = layout & COMPACTED != 0;
    let held = if compacted {
        layout & !COMPACTED
    } else {
        enabled
    };
    let unknown = stored & !enabled != 0 || held & !enabled != 0 || stored & !held != 0;
    let malformed = !compacted && layout != 0 || area[RESERVED].iter().any(|&byte| byte != 0);
    if unknown || malformed {
        return Err(Fault::Protection);
    }
    let places = placed(held, compacted);
    let len = places
        .iter()
        .filter(|(component, _)| stored & component.bit != 0);
    area.resize(
        len.map(|(_, range)| range.end).fold(EXTENDED, usize::max),
        0,
    );
    cpu.load(address, &mut area)?;
    let loaded = asked & stored;
    let mask = mxcsr_mask(has);
    let mut set = |range: Range<usize>, from: Option<Range<usize>>| match from {
        Some(from) => has[range].copy_from_slice(&area[from]),
        None => has[range].fill(0),
    };
    let given = |bit: u64, range: &Range<usize>| (loaded & bit != 0).then(|| range.clone());
    if asked & X87 != 0 {
        X87_REGISTERS
            .into_iter()
            .for_each(|range| set(range.clone(), given(X87, &range)));
    }
    if asked & SSE != 0 {
        set(SSE_REGISTERS, given(SSE, &SSE_REGISTERS));
    }
    // The compacted form treats MXCSR as a part of SSE, the standard one does not.
    let mxcsr = if compacted { SSE } else { SSE | AVX };
    if asked & mxcsr != 0 {
        if word(&area, MXCSR_AND_MASK) as u32 & !mask != 0 {
            return Err(Fault::Protection);
        }
        set(MXCSR, Some(MXCSR));
    }
    for component in components(asked) {
        let place = places.iter().find(|(held, _)| held.bit == component.bit);
        let from = place.map(|(_, range)| range.clone());
        set(
            component.standard.clone(),
            from.filter(|_| loaded & component.bit != 0),
        );
    }
    if asked & X87 != 0 && loaded & X87 == 0 {
        has[..2].copy_from_slice(&INITIAL_FCW);
    }
    if compacted && asked & SSE != 0 && loaded & SSE == 0 {
        has[MXCSR].copy_from_slice(&INITIAL_MXCSR);
    }
    let state = word(has, XSTATE_BV) & !asked | loaded | in_use(has) & SSE;
    has[HEADER].fill(0);
    has[XSTATE_BV].copy_from_slice(&state.to_le_bytes());
    Ok(())
}
