//! The first instructions of every vCPU, down to ring 3.
//!
//! Three ways in, one way on:
//! * [`linux_entry`](self): the ELF entry. 64-bit mode, RSI = Linux `boot_params` (the zero page).
//! * `pvh_entry`: the PVH note. 32-bit protected mode, paging off, EBX = `hvm_start_info`.
//! * `ap_trampoline`: what a startup IPI runs, in real mode, from [`TRAMPOLINE`].
//!
//! `cpu_start` loads this vCPU's tables, turns on SSE and (where there is XSAVE) AVX, and leaves for
//! ring 3 by IRETQ with IOPL 3: to `start` on the first vCPU, to `ap_start` on the others.
//!
//! This is as little as can be, and plain instructions only: some KVMs interpret ring 0 at about
//! a microsecond each. What ring 3 can do (fill the IDT, program the LAPIC) is done there.

#![allow(unsafe_code)] // The code before the first Rust function can only be assembly.

use core::arch::global_asm;

use forkvm_abi::MAX_VCPUS;

use crate::descriptors::{KERNEL_CODE, TSS_STRIDE, TSS0, USER_CODE, USER_DATA};
use crate::paging::PML4;

/// Where the trampoline of the other vCPUs is put: below 1 MiB, page-aligned, and free once the
/// boot information has been copied.
pub const TRAMPOLINE: usize = 0x8000;

/// Bytes of a vCPU's ring-3 stack. Only what is used is ever populated.
const STACK: usize = 256 << 10;

/// Bytes of a vCPU's ring-0 stack: an interrupt frame or two.
const RING0_STACK: usize = 4 << 10;

global_asm!(
    r#"
    .section .note.pvh, "a", @note
    .balign 4
    .long 4                         # size of the name
    .long 8                         # size of the descriptor
    .long 18                        # XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad pvh_entry

    .section .text.boot, "ax", @progbits

    .code64
    .global linux_entry
linux_entry:
    cli
    cld
    mov r12, rsi
    xor r13d, r13d                  # BootProtocol::Linux
first_cpu:
    mov eax, offset {pml4}
    mov cr3, rax
    xor r14d, r14d                  # vCPU 0
    mov r15, offset start
    mov ebp, 0x3002                 # RFLAGS: IOPL 3, interrupts off until the IDT is filled
    jmp cpu_start

    .code32
    .global pvh_entry
pvh_entry:
    cli
    cld
    lgdt [gdt_pointer]
    mov edi, offset pvh_long
    jmp enter_long_mode

    # On with paging; then to the 64-bit code at EDI.
enter_long_mode:
    mov eax, 0x20                   # CR4.PAE
    mov cr4, eax
    mov eax, offset {pml4}
    mov cr3, eax
    mov ecx, 0xc0000080             # EFER
    rdmsr
    or eax, 0x100                   # LME
    wrmsr
    mov eax, 0x80000033             # CR0: PG, NE, ET, MP, PE
    mov cr0, eax
    .byte 0xea                      # far jump
    .long long_mode
    .word {kernel_code}

    .code64
long_mode:
    mov edi, edi
    jmp rdi

pvh_long:
    mov r12d, ebx
    mov r13d, 1                     # BootProtocol::Pvh
    jmp first_cpu

ap_long:
    mov r14d, 1
    lock xadd [next_cpu], r14d      # vCPUs number themselves in the order they arrive
    mov r12d, r14d
    mov r15, offset ap_start
    mov ebp, 0x3202                 # RFLAGS: IOPL 3, interrupts on

    # R14 = index of this vCPU, R15 = where to go in ring 3 with RDI = R12 and RSI = R13,
    # EBP = RFLAGS there.
cpu_start:
    mov eax, 0x80000033             # CR0: PG, NE, ET, MP, PE; EM and TS off
    mov cr0, rax
    mov esi, 0x620                  # CR4: PAE, OSFXSR, OSXMMEXCPT
    mov eax, 1
    cpuid
    bt ecx, 26                      # XSAVE
    jnc 2f
    or esi, 0x40000                 # CR4: OSXSAVE
    mov cr4, rsi
    mov eax, 0xd
    xor ecx, ecx
    cpuid
    and eax, 7                      # XCR0: x87, SSE, AVX, as far as they are there
    xor edx, edx
    xor ecx, ecx
    xsetbv
    jmp 3f
2:
    mov cr4, rsi
3:
    lgdt [gdt_pointer]
    lidt [idt_pointer]
    mov eax, {user_data}
    mov ds, eax
    mov es, eax
    mov fs, eax
    mov gs, eax

    # The TSS of this vCPU: its ring-0 stack, and the I/O bitmap that all share. It lies behind the
    # last TSS.
    mov ecx, r14d
    inc ecx
    imul ecx, ecx, {ring0_stack}
    add ecx, offset ring0_stacks
    mov rsp, rcx
    mov eax, r14d
    imul eax, eax, {tss_stride}
    add eax, offset tss
    mov [rax + 4], rcx              # RSP0
    mov edi, offset io_bitmap
    sub edi, eax
    mov [rax + 102], di             # I/O map base

    # Its descriptor in the GDT: available 64-bit TSS, up to the byte behind the bitmap.
    mov ecx, r14d
    shl ecx, 4
    add ecx, {tss0}
    movzx edx, ax
    shl edx, 16
    add edi, 8192
    or edx, edi
    mov dword ptr [rcx + gdt], edx
    mov edx, eax
    shr edx, 16
    and edx, 0xff
    and eax, 0xff000000
    or eax, edx
    or eax, 0x8900
    mov dword ptr [rcx + gdt + 4], eax
    mov dword ptr [rcx + gdt + 8], 0
    mov dword ptr [rcx + gdt + 12], 0
    ltr cx

    # To ring 3. A function expects RSP + 8 to be a multiple of 16.
    mov eax, r14d
    inc eax
    imul eax, eax, {stack}
    add eax, offset stacks - 8
    push {user_data}
    push rax
    push rbp
    push {user_code}
    push r15
    mov rdi, r12
    mov rsi, r13
    iretq

    .code16
    .global ap_trampoline
ap_trampoline:
    jmp 2f
    .balign 8
    .word 3 * 8 - 1                 # at offset 8: the pointer to the GDT of this page
    .long {trampoline} + 16
    .balign 8
    .quad 0                         # at offset 16: that GDT
    .quad 0x00cf9b000000ffff        # 0x08 ring-0 code, 32-bit
    .quad 0x00cf93000000ffff        # 0x10 ring-0 data
2:
    cli
    mov ax, cs
    mov ds, ax
    .byte 0x66                      # a 32-bit base
    lgdt ds:[8]
    mov eax, 0x33                   # CR0: NE, ET, MP, PE; caches on
    mov cr0, eax
    .byte 0x66, 0xea                # far jump with a 32-bit offset
    .long {trampoline} + 3f - ap_trampoline
    .word 0x08
    .code32
3:
    mov eax, 0x10
    mov ds, eax
    mov ss, eax
    lgdt [gdt_pointer]
    mov edi, offset ap_long
    mov eax, offset enter_long_mode
    jmp eax
    .code64
    .global ap_trampoline_end
ap_trampoline_end:
    .code64

    .section .data.next_cpu, "aw", @progbits
    .balign 4
next_cpu:
    .long 1

    .section .bss.stacks, "aw", @nobits
    .balign 4096
ring0_stacks:
    .skip {ring0_stack} * {cpus}
stacks:
    .skip {stack} * {cpus}
    "#,
    pml4 = sym PML4,
    kernel_code = const KERNEL_CODE,
    trampoline = const TRAMPOLINE,
    user_data = const USER_DATA,
    user_code = const USER_CODE,
    tss0 = const TSS0,
    tss_stride = const TSS_STRIDE,
    stack = const STACK,
    ring0_stack = const RING0_STACK,
    cpus = const MAX_VCPUS,
);

unsafe extern "C" {
    static ap_trampoline: u8;
    static ap_trampoline_end: u8;
}

/// Puts the trampoline where startup IPIs look for it.
pub fn place_trampoline() {
    // SAFETY: the two symbols bound the trampoline's bytes, and the page at TRAMPOLINE is RAM that
    // nobody uses: everything that the VMM left in low memory has been copied by now.
    unsafe {
        let from = &raw const ap_trampoline;
        let len = (&raw const ap_trampoline_end).offset_from_unsigned(from);
        core::ptr::copy_nonoverlapping(
            from,
            core::ptr::with_exposed_provenance_mut(TRAMPOLINE),
            len,
        );
    }
}
