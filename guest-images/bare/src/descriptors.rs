//! Segments, task state segments and the interrupt descriptor table.
//!
//! All vCPUs share one GDT and one IDT; each has a TSS, for the ring-0 stack that an interrupt in
//! ring 3 switches to, and for the I/O bitmap that opens every port to ring 3. IOPL 3 opens them as
//! well, and both are needed: kvm-pvm drops IOPL at IRETQ, and QEMU's emulation (under the SVM lane's
//! KVM) ignores the bitmap of a TSS that was restored, since its descriptor is a busy one.
//! The tables are data of the image; `boot` fills in a vCPU's TSS when it
//! starts, and [`fill_idt`] the gates, from ring 3, before interrupts are on.

#![allow(unsafe_code)] // Tables that the CPU reads.

use core::arch::global_asm;

use forkvm_abi::MAX_VCPUS;

/// Selector of ring-0 64-bit code.
pub const KERNEL_CODE: u16 = 0x08;
/// Selector of ring-3 data.
pub const USER_DATA: u16 = 0x18 | 3;
/// Selector of ring-3 64-bit code.
pub const USER_CODE: u16 = 0x20 | 3;
/// Selector of the TSS of vCPU 0; the next one's is 16 higher.
pub const TSS0: u16 = 0x28;
/// Bytes between two TSSs. A TSS has 104; at this distance none crosses a page.
pub const TSS_STRIDE: usize = 128;

/// Vectors that have an exception gate: those that the architecture defines.
const EXCEPTIONS: usize = 32;
/// Bit `n` is set when exception `n` pushes an error code (Intel SDM volume 3, chapter 6.15).
const HAS_ERROR_CODE: u32 = 1 << 8 | 0x1f << 10 | 1 << 17 | 1 << 21 | 3 << 29;
/// Vector of INT3, which ring 3 uses to enter ring 0.
const BREAKPOINT: usize = 3;
/// Bytes between two entry stubs.
pub const STUB_STRIDE: usize = 16;

global_asm!(
    r#"
    .section .data.tables, "aw", @progbits
    .balign 16
    .global gdt
gdt:
    .quad 0
    .quad 0x00af9b000000ffff        # 0x08 ring-0 code, 64-bit
    .quad 0x00cf93000000ffff        # 0x10 ring-0 data
    .quad 0x00cff3000000ffff        # 0x18 ring-3 data
    .quad 0x00affb000000ffff        # 0x20 ring-3 code, 64-bit
    .skip 16 * {cpus}               # 0x28 on: the TSSs
    .global gdt_end
gdt_end:

    .balign 16
    .global gdt_pointer
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt

    .balign 16
    .global idt_pointer
idt_pointer:
    .word 256 * 16 - 1
    .quad {idt}

    .section .bss.tss, "aw", @nobits
    .balign 128
    .global tss
tss:
    .skip {tss_stride} * {cpus}
    .global io_bitmap
io_bitmap:                          # all zero: ring 3 may use every port
    .skip 8192 + 1

    .section .text, "ax", @progbits
    .balign 16
exception_stubs:
    .set vector, 0
    .rept {exceptions}
    .balign {stub_stride}
    .if (({has_error_code}) >> vector & 1) == 0
    push 0
    .endif
    push vector
    jmp exception
    .set vector, vector + 1
    .endr

    # Leaves for ring 3 on a stack of its own, with what happened in the registers of a call.
    .global exception
exception:
    pop rdi                         # vector
    pop rsi                         # error code
    cmp qword ptr [rsp], offset ring0_wrmsr
    je 2f
    cmp qword ptr [rsp], offset ring0_rdmsr
    je 2f
    lock bts dword ptr [exception_taken], 0
    jc 3f                           # one vCPU reports; its stack is the only one
    pop rdx                         # RIP
    mov rcx, cr2
    mov r8, [rsp + 16]              # RSP
    push {user_data}
    push offset exception_stack_top - 8
    push 0x3002
    push {user_code}
    push offset {report}
    iretq

    # An MSR that this CPU does not have.
2:
    mov qword ptr [rsp], offset ring0_refused
    iretq
3:
    hlt
    jmp 3b

    .section .bss.exception_stack, "aw", @nobits
    .balign 16
    .skip 16384
exception_stack_top:
exception_taken:
    .skip 4
    "#,
    cpus = const MAX_VCPUS,
    tss_stride = const TSS_STRIDE,
    idt = sym IDT,
    exceptions = const EXCEPTIONS,
    stub_stride = const STUB_STRIDE,
    has_error_code = const HAS_ERROR_CODE,
    user_data = const USER_DATA,
    user_code = const USER_CODE,
    report = sym crate::panic::exception,
);

unsafe extern "C" {
    static exception_stubs: u8;
}

/// One entry of the IDT (Intel SDM volume 3, figure 6-8).
#[repr(C)]
#[derive(Clone, Copy)]
struct Gate {
    offset_low: u16,
    selector: u16,
    ist: u8,
    attributes: u8,
    offset_middle: u16,
    offset_high: u32,
    reserved: u32,
}

impl Gate {
    const EMPTY: Gate = Gate {
        offset_low: 0,
        selector: 0,
        ist: 0,
        attributes: 0,
        offset_middle: 0,
        offset_high: 0,
        reserved: 0,
    };

    /// A present interrupt gate (it masks interrupts) to `handler`, callable from ring `dpl` on.
    fn to(handler: usize, dpl: u8) -> Gate {
        Gate {
            offset_low: handler as u16,
            selector: KERNEL_CODE,
            ist: 0,
            attributes: 0x8e | dpl << 5,
            offset_middle: (handler >> 16) as u16,
            offset_high: (handler >> 32) as u32,
            reserved: 0,
        }
    }
}

#[repr(C, align(16))]
struct Idt([Gate; 256]);

static mut IDT: Idt = Idt([Gate::EMPTY; 256]);

/// Fills the exception gates and the one by which ring 3 enters ring 0. Called once, before
/// interrupts are on.
pub fn fill_idt() {
    let stubs = (&raw const exception_stubs).addr();
    for vector in 0..EXCEPTIONS {
        set_gate(vector, Gate::to(stubs + vector * STUB_STRIDE, 0));
    }
    set_gate(BREAKPOINT, Gate::to(crate::ring0::entry(), 3));
}

/// Sends `vector` to the ring-0 code at `handler`. Called before anything can raise it.
pub fn set_interrupt(vector: usize, handler: usize) {
    set_gate(vector, Gate::to(handler, 0));
}

fn set_gate(vector: usize, gate: Gate) {
    // SAFETY: gates are set by the first vCPU only, each before its vector can be raised, so
    // neither a CPU nor other code reads it meanwhile.
    unsafe { (&raw mut IDT.0[vector]).write_volatile(gate) };
}
