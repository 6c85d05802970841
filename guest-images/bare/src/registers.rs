//! Every register class of a vCPU, filled with values that tell the vCPU and compared afterwards.
//!
//! Two kinds. What code uses all the time (general registers, flags, x87, SSE, AVX) is loaded by
//! [`Registers::hold`], held over one instruction or loop that touches nothing else, and stored.
//! What nothing here uses (MSRs, debug registers, CR2, local APIC registers) is set once by
//! [`Registers::set_system`] and stays.

#![allow(unsafe_code)] // Loads registers behind the compiler's back.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use core::arch::global_asm;
use core::arch::x86_64::{__cpuid, _xgetbv};
use core::mem::offset_of;
use core::sync::atomic::{AtomicU32, Ordering};

use crate::random::mix;
use crate::{interrupts, println, ring0};

/// What happens while the registers are held.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Hold {
    /// A 32-bit write of `value` to `port`.
    Out {
        /// The port.
        port: u16,
        /// The value.
        value: u32,
    },
    /// A loop until [`release`].
    UntilReleased,
    /// A loop of so many rounds, at least one.
    Rounds(u32),
}

/// Ends every [`Hold::UntilReleased`], now and later.
pub fn release() {
    RELEASED.store(1, Ordering::Release);
}

static RELEASED: AtomicU32 = AtomicU32::new(0);

/// Places in [`Block::input`] and [`Block::output`], in the order of the assembly.
const RAX: usize = 0;
const RCX: usize = 2;
const RDX: usize = 3;
const RFLAGS: usize = 15;
/// CF, PF, AF, ZF, SF, DF, OF, AC and ID: what ring 3 can change.
const SETTABLE_FLAGS: u64 = 0x24_0cd5;
const DIRECTION_FLAG: u64 = 0x400;

/// What the assembly loads from and stores to.
#[repr(C, align(64))]
struct Block {
    input: [u64; 16],
    output: [u64; 16],
    /// Upper halves of YMM0 to YMM15.
    high_input: [u128; 16],
    high_output: [u128; 16],
    /// FXSAVE images: x87, MXCSR, XMM0 to XMM15.
    fx_input: Fx,
    fx_output: Fx,
    fx_saved: Fx,
    avx: u64,
    target: *const u8,
}

/// An image of FXSAVE64 (Intel SDM volume 1, section 10.5.1).
#[repr(C, align(16))]
#[derive(Clone, Copy, PartialEq, Eq)]
struct Fx([u8; 512]);

global_asm!(
    r#"
    .section .text, "ax", @progbits
    .balign 16
registers_hold:                     # RDI = Block
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    push rdi
    fxsave64 [rdi + {fx_saved}]
    fxrstor64 [rdi + {fx_input}]
    cmp qword ptr [rdi + {avx}], 0
    je 2f
    .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
    vinsertf128 ymm\n, ymm\n, xmmword ptr [rdi + {high_input} + 16 * \n], 1
    .endr
2:
    push qword ptr [rdi + {target}]
    push qword ptr [rdi + {input} + 120]
    mov rax, [rdi + {input} + 0]
    mov rbx, [rdi + {input} + 8]
    mov rcx, [rdi + {input} + 16]
    mov rdx, [rdi + {input} + 24]
    mov rsi, [rdi + {input} + 32]
    mov rbp, [rdi + {input} + 48]
    mov r8, [rdi + {input} + 56]
    mov r9, [rdi + {input} + 64]
    mov r10, [rdi + {input} + 72]
    mov r11, [rdi + {input} + 80]
    mov r12, [rdi + {input} + 88]
    mov r13, [rdi + {input} + 96]
    mov r14, [rdi + {input} + 104]
    mov r15, [rdi + {input} + 112]
    mov rdi, [rdi + {input} + 40]
    popfq
    jmp [rsp]

    # From here to registers_collect nothing changes a register but RCX, nor a flag.
registers_out:
    out dx, eax
    jmp registers_collect
registers_until_released:
    pause
    mov ecx, [rip + {released}]
    jrcxz registers_until_released
    jmp registers_collect
registers_rounds:
    pause
    loop registers_rounds

registers_collect:
    pushfq
    push rdi
    mov rdi, [rsp + 24]
    mov [rdi + {output} + 0], rax
    mov [rdi + {output} + 8], rbx
    mov [rdi + {output} + 16], rcx
    mov [rdi + {output} + 24], rdx
    mov [rdi + {output} + 32], rsi
    mov [rdi + {output} + 48], rbp
    mov [rdi + {output} + 56], r8
    mov [rdi + {output} + 64], r9
    mov [rdi + {output} + 72], r10
    mov [rdi + {output} + 80], r11
    mov [rdi + {output} + 88], r12
    mov [rdi + {output} + 96], r13
    mov [rdi + {output} + 104], r14
    mov [rdi + {output} + 112], r15
    pop rax
    mov [rdi + {output} + 40], rax
    pop rax
    mov [rdi + {output} + 120], rax
    add rsp, 8
    push 0x202                      # the flags that Rust code expects
    popfq
    fxsave64 [rdi + {fx_output}]
    cmp qword ptr [rdi + {avx}], 0
    je 2f
    .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
    vextractf128 xmmword ptr [rdi + {high_output} + 16 * \n], ymm\n, 1
    .endr
    vzeroupper
2:
    fxrstor64 [rdi + {fx_saved}]
    pop rdi
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret

    # Ring 0, by INT3.
ring0_set_debug:                    # RDI = four addresses, RSI = CR2
    mov rax, [rdi]
    mov dr0, rax
    mov rax, [rdi + 8]
    mov dr1, rax
    mov rax, [rdi + 16]
    mov dr2, rax
    mov rax, [rdi + 24]
    mov dr3, rax
    mov cr2, rsi
    iretq
ring0_read_system:                  # RDI = where to
    mov rax, dr0
    mov [rdi], rax
    mov rax, dr1
    mov [rdi + 8], rax
    mov rax, dr2
    mov [rdi + 16], rax
    mov rax, dr3
    mov [rdi + 24], rax
    mov rax, dr7
    mov [rdi + 32], rax
    mov rax, cr0
    mov [rdi + 40], rax
    mov rax, cr2
    mov [rdi + 48], rax
    mov rax, cr3
    mov [rdi + 56], rax
    mov rax, cr4
    mov [rdi + 64], rax
    iretq
    "#,
    released = sym RELEASED,
    input = const offset_of!(Block, input),
    output = const offset_of!(Block, output),
    high_input = const offset_of!(Block, high_input),
    high_output = const offset_of!(Block, high_output),
    fx_input = const offset_of!(Block, fx_input),
    fx_output = const offset_of!(Block, fx_output),
    fx_saved = const offset_of!(Block, fx_saved),
    avx = const offset_of!(Block, avx),
    target = const offset_of!(Block, target),
);

unsafe extern "C" {
    fn registers_hold(block: *mut Block);
    static registers_out: u8;
    static registers_until_released: u8;
    static registers_rounds: u8;
    static ring0_set_debug: u8;
    static ring0_read_system: u8;
}

/// MSRs that nothing here uses, and the bits of each that may hold anything (the Intel SDM's
/// volume 4 and the AMD APM's volume 2, appendix A). Addresses have to be canonical.
const MSRS: [(&str, u32, u64); 11] = [
    ("STAR", 0xc000_0081, 0xffff_ffff_0000_0000),
    ("LSTAR", 0xc000_0082, 0x7fff_ffff_ffff),
    ("CSTAR", 0xc000_0083, 0x7fff_ffff_ffff),
    ("FMASK", 0xc000_0084, 0xffff_ffff),
    ("FS_BASE", 0xc000_0100, 0x7fff_ffff_ffff),
    ("GS_BASE", 0xc000_0101, 0x7fff_ffff_ffff),
    ("KERNEL_GS_BASE", 0xc000_0102, 0x7fff_ffff_ffff),
    ("TSC_AUX", 0xc000_0103, 0xffff),
    ("SYSENTER_CS", 0x174, 0xffff),
    ("SYSENTER_ESP", 0x175, 0x7fff_ffff),
    ("SYSENTER_EIP", 0x176, 0x7fff_ffff),
];
/// The page attribute table. Its upper half is never selected by these page tables.
const PAT: (&str, u32) = ("PAT", 0x277);
/// Entry 7 of the PAT: write-protected instead of uncached.
const PAT_VALUE: u64 = 0x0507_0406_0007_0406;
/// MSRs in all.
const MSR_COUNT: usize = MSRS.len() + 1;

/// Local APIC registers, and values that let every interrupt of this guest through.
const LAPIC: [(&str, usize, u32); 3] = [
    ("TPR", 0x80, 0x10),
    ("LVT timer", 0x320, 1 << 16 | 0x51),
    ("timer divide", 0x3e0, 0xb),
];

/// DR0 to DR3, DR7, CR0, CR2, CR3, CR4.
const SYSTEM: [&str; 9] = [
    "DR0", "DR1", "DR2", "DR3", "DR7", "CR0", "CR2", "CR3", "CR4",
];

/// The registers of one vCPU.
pub struct Registers {
    block: Box<Block>,
    cpu: usize,
    seed: u64,
    hold: Hold,
    /// By the order of [`all_msrs`]; `None` for one that this CPU refuses.
    msrs: [Option<u64>; MSR_COUNT],
    system: [u64; SYSTEM.len()],
    xcr0: u64,
}

impl Registers {
    /// Values for vCPU `cpu`; nothing is loaded yet.
    pub fn new(cpu: usize, seed: u64) -> Registers {
        let fx = Fx([0; 512]);
        let mut block = Box::new(Block {
            input: [0; 16],
            output: [0; 16],
            high_input: [0; 16],
            high_output: [0; 16],
            fx_input: fx,
            fx_output: fx,
            fx_saved: fx,
            avx: u64::from(xcr0() & 6 == 6),
            target: core::ptr::null(),
        });
        let seed = mix(seed ^ (cpu as u64) << 48);
        for (high, index) in block.high_input.iter_mut().zip(0..) {
            *high = u128::from(mix(seed + index)) << 64 | u128::from(mix(seed ^ index));
        }
        fill_fx(&mut block.fx_input, seed);
        let hold = Hold::Rounds(1);
        let (msrs, system) = ([None; MSR_COUNT], [0; SYSTEM.len()]);
        Registers {
            block,
            cpu,
            seed,
            hold,
            msrs,
            system,
            xcr0: 0,
        }
    }

    /// Sets the calling vCPU's system registers and remembers what they read as.
    pub fn set_system(&mut self) {
        let address = |index: u64| mix(self.seed ^ index << 8) & 0x7fff_ffff_f000;
        let debug = [1, 2, 3, 4].map(address);
        // SAFETY: breakpoint addresses of breakpoints that DR7 leaves off, and CR2, which only a
        // page fault handler reads.
        unsafe {
            ring0::call(
                &raw const ring0_set_debug,
                debug.as_ptr().addr() as u64,
                address(5),
            );
        }
        for (kept, (name, msr, value)) in self.msrs.iter_mut().zip(all_msrs(self.seed)) {
            // SAFETY: MSRs that this guest does not work with, and values that each may have.
            let written = unsafe { ring0::write_msr(msr, value) };
            *kept = ring0::read_msr(msr).filter(|_| written);
            if *kept != Some(value) && self.cpu == 0 {
                println!("note: MSR {name} does not keep what is written: {kept:x?}");
            }
        }
        LAPIC
            .iter()
            .for_each(|&(_, register, value)| interrupts::lapic_write(register, value));
        self.system = read_system();
        self.xcr0 = xcr0();
        if self.system[..4] != debug && self.cpu == 0 {
            println!("note: the debug registers do not keep what is written to them");
        }
    }

    /// Loads the calling vCPU's registers, holds them, and stores them.
    pub fn hold(&mut self, hold: Hold) {
        self.hold = hold;
        let block = &mut *self.block;
        for (register, index) in block.input.iter_mut().zip(0..) {
            *register = mix(self.seed ^ index << 16);
        }
        block.input[RFLAGS] = mix(self.seed) & SETTABLE_FLAGS | DIRECTION_FLAG | 0x202;
        block.target = match hold {
            Hold::Out { port, value } => {
                block.input[RDX] = u64::from(port);
                block.input[RAX] = u64::from(value);
                &raw const registers_out
            }
            Hold::UntilReleased => &raw const registers_until_released,
            Hold::Rounds(rounds) => {
                block.input[RCX] = u64::from(rounds.max(1));
                &raw const registers_rounds
            }
        };
        // SAFETY: the block is laid out for the assembly, which restores what Rust relies on. An
        // `out` may make the host write memory that is shared with it: a call, opaque to Rust, lies
        // around it.
        unsafe { registers_hold(block) };
    }

    /// The first register that [`Registers::hold`] stored otherwise than it was loaded.
    pub fn check_held(&self) -> Result<(), String> {
        let block = &*self.block;
        for register in 0..RFLAGS {
            let expected = match (register, self.hold) {
                (RCX, Hold::UntilReleased) => 1,
                (RCX, Hold::Rounds(_)) => 0,
                _ => block.input[register],
            };
            let found = block.output[register];
            if found != expected {
                return Err(format!(
                    "general register {register}: {found:#x}, not {expected:#x}"
                ));
            }
        }
        let (found, expected) = (
            block.output[RFLAGS] & SETTABLE_FLAGS,
            block.input[RFLAGS] & SETTABLE_FLAGS,
        );
        if found != expected {
            return Err(format!("RFLAGS: {found:#x}, not {expected:#x}"));
        }
        for (index, (found, expected)) in
            block.fx_output.0.iter().zip(&block.fx_input.0).enumerate()
        {
            // Bytes 28 to 31 are a constant of the CPU, from 464 on nobody's.
            if found != expected && !(28..32).contains(&index) && index < 464 {
                let class = match index {
                    0..24 => "x87 control",
                    24..28 => "MXCSR",
                    32..160 => "x87 stack",
                    _ => "XMM",
                };
                return Err(format!(
                    "{class}, FXSAVE byte {index}: {found:#x}, not {expected:#x}"
                ));
            }
        }
        if block.avx != 0 && block.high_output != block.high_input {
            return Err("AVX: an upper half of a YMM register".into());
        }
        Ok(())
    }

    /// The first system register of the calling vCPU that is not as it was after
    /// [`Registers::set_system`].
    pub fn check_system(&self) -> Result<(), String> {
        for ((name, msr, _), expected) in all_msrs(self.seed).zip(self.msrs) {
            let found = expected.and_then(|_| ring0::read_msr(msr));
            if found != expected {
                return Err(format!("MSR {name}: {found:x?}, not {expected:x?}"));
            }
        }
        for ((name, found), expected) in SYSTEM.iter().zip(read_system()).zip(self.system) {
            if found != expected {
                return Err(format!("{name}: {found:#x}, not {expected:#x}"));
            }
        }
        for &(name, register, expected) in &LAPIC {
            let found = interrupts::lapic_read(register);
            if found != expected {
                return Err(format!("local APIC {name}: {found:#x}, not {expected:#x}"));
            }
        }
        if xcr0() != self.xcr0 {
            return Err(format!("XCR0: {:#x}, not {:#x}", xcr0(), self.xcr0));
        }
        Ok(())
    }
}

/// Values for x87 (all eight registers in use), MXCSR and XMM that raise no exception.
fn fill_fx(fx: &mut Fx, seed: u64) {
    let mut put = |at: usize, bytes: &[u8]| fx.0[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &0x0b7f_u16.to_le_bytes()); // FCW: exceptions masked, round up, extended precision
    put(4, &[0xff]); // FTW, abridged: eight registers in use
    put(24, &0x5f80_u32.to_le_bytes()); // MXCSR: exceptions masked, round up
    for (at, index) in (32..160).step_by(16).zip(0..) {
        // A normal number: the integer bit is set, the exponent is near 1.
        put(at, &(mix(seed ^ index << 24) | 1 << 63).to_le_bytes());
        put(at + 8, &(0x3fff_u16 + index as u16).to_le_bytes());
    }
    for (at, index) in (160..416).step_by(8).zip(0..) {
        put(at, &mix(seed ^ index << 32).to_le_bytes());
    }
}

/// XCR0, or 0 where there is no XSAVE.
fn xcr0() -> u64 {
    const OSXSAVE: u32 = 1 << 27;
    if __cpuid(1).ecx & OSXSAVE == 0 {
        return 0;
    }
    // SAFETY: CR4.OSXSAVE is set, says CPUID.
    unsafe { xgetbv0() }
}

/// # Safety
/// CR4.OSXSAVE is set.
#[target_feature(enable = "xsave")]
unsafe fn xgetbv0() -> u64 {
    // SAFETY: the caller's word.
    unsafe { _xgetbv(0) }
}

/// Every MSR that is filled, with its value.
fn all_msrs(seed: u64) -> impl Iterator<Item = (&'static str, u32, u64)> {
    let filled = MSRS.iter().zip(0..);
    let filled =
        filled.map(move |(&(name, msr, mask), index)| (name, msr, mix(seed ^ index) & mask));
    filled.chain([(PAT.0, PAT.1, PAT_VALUE)])
}

fn read_system() -> [u64; SYSTEM.len()] {
    let mut values = [0u64; SYSTEM.len()];
    // SAFETY: the routine writes exactly these nine values.
    unsafe {
        ring0::call(
            &raw const ring0_read_system,
            (&raw mut values).expose_provenance() as u64,
            0,
        );
        (&raw const values).read_volatile()
    }
}
