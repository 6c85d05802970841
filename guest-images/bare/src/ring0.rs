//! What needs ring 0, and how ring 3 gets there: INT3 with a routine in RAX.
//!
//! INT3 is the one software interrupt that every KVM delivers from ring 3. A breakpoint that was
//! not made here lacks the mark in R11 and is reported as the exception it is.

#![allow(unsafe_code)] // Privileged instructions.

use core::arch::{asm, global_asm};
use core::sync::atomic::AtomicU32;

/// Value of R11 that tells a call from a stray breakpoint.
const MARK: u32 = 0x6b72_3066;

global_asm!(
    r#"
    .section .text, "ax", @progbits
    .balign 16
ring0_entry:
    cmp r11d, {mark}
    jne 2f
    jmp rax
2:
    push 0
    push 3
    jmp exception

    # Halts while the 32-bit value at RDI is ESI. Interrupts are off from the look at the value up
    # to the instruction after STI, so a wake-up in between ends the HLT.
ring0_wait:
    cmp dword ptr [rdi], esi
    jne 2f
    sti
    hlt
2:
    iretq

    # Writes RSI to MSR RDI. RAX becomes 0, or 1 when that raised an exception.
ring0_write_msr:
    mov ecx, edi
    mov eax, esi
    mov rdx, rsi
    shr rdx, 32
    .global ring0_wrmsr
ring0_wrmsr:
    wrmsr
    mov eax, 0
    iretq

    # Reads MSR RDI into the eight bytes at RSI. RAX as above.
ring0_read_msr:
    mov ecx, edi
    .global ring0_rdmsr
ring0_rdmsr:
    rdmsr
    mov [rsi], eax
    mov [rsi + 4], edx
    mov eax, 0
    iretq
    .global ring0_refused
ring0_refused:
    mov eax, 1
    iretq

    # Drops all translations but those of global pages, of which there are none.
ring0_flush:
    mov rax, cr3
    mov cr3, rax
    iretq

    # Leaves no gate for the exception that follows, nor for those that this raises.
ring0_triple_fault:
    lidt [rdi]
    ud2

    # Interrupts on, in the RFLAGS that ring 3 gets back.
ring0_enable_interrupts:
    or dword ptr [rsp + 16], 0x200
    iretq
    "#,
    mark = const MARK,
);

unsafe extern "C" {
    static ring0_entry: u8;
    static ring0_wait: u8;
    static ring0_enable_interrupts: u8;
    static ring0_triple_fault: u8;
    static ring0_flush: u8;
    static ring0_write_msr: u8;
    static ring0_read_msr: u8;
}

/// Address of the handler of INT3.
pub fn entry() -> usize {
    (&raw const ring0_entry).addr()
}

/// Turns interrupts on for this vCPU, for good: ring 3 has no way to turn them off.
pub fn enable_interrupts() {
    // SAFETY: the routine changes one flag; the gates that interrupts go through are set.
    unsafe { call(&raw const ring0_enable_interrupts, 0, 0) };
}

/// Has this vCPU go by its page tables as they are now.
pub fn flush_translations() {
    // SAFETY: the routine loads the CR3 that is there.
    unsafe { call(&raw const ring0_flush, 0, 0) };
}

/// Ends this vCPU by a triple fault (Intel SDM volume 3, chapter 6.15, interrupt 8).
pub fn triple_fault() {
    let no_table = [0u8; 10];
    let pointer = (&raw const no_table).expose_provenance() as u64;
    // SAFETY: the routine reads the ten bytes and does not come back.
    unsafe { call(&raw const ring0_triple_fault, pointer, 0) };
}

/// Halts until an interrupt comes, unless `word` is no longer `value`. Callers loop: any interrupt
/// ends the wait.
pub fn wait_while(word: &AtomicU32, value: u32) {
    // SAFETY: the routine reads the word, which is borrowed, and halts.
    unsafe {
        call(
            &raw const ring0_wait,
            word.as_ptr().addr() as u64,
            u64::from(value),
        )
    };
}

/// Writes `value` to `msr` of this vCPU. False where the CPU refuses it (CPUID, as ring 3 reads it,
/// does not always tell what a KVM lets a guest have).
///
/// # Safety
/// Nothing in this guest relies on what `msr` does.
pub unsafe fn write_msr(msr: u32, value: u64) -> bool {
    // SAFETY: the routine writes the MSR; the rest is the caller's word.
    unsafe { call(&raw const ring0_write_msr, u64::from(msr), value) == 0 }
}

/// Reads `msr` of this vCPU; `None` where the CPU refuses it.
pub fn read_msr(msr: u32) -> Option<u64> {
    let mut value = 0u64;
    // SAFETY: the routine writes the eight bytes of `value`; reading an MSR changes nothing.
    unsafe {
        let to = (&raw mut value).expose_provenance() as u64;
        let refused = call(&raw const ring0_read_msr, u64::from(msr), to);
        (refused == 0).then_some((&raw const value).read_volatile())
    }
}

/// Runs the ring-0 code at `routine` with RDI and RSI; it ends in IRETQ and changes no register
/// but RAX, RCX, RDX, RSI and RDI. Answers RAX.
///
/// # Safety
/// `routine` is one of the assembly routines written for this, and its arguments are what it needs.
pub unsafe fn call(routine: *const u8, rdi: u64, rsi: u64) -> u64 {
    let answer;
    // SAFETY: the gate of vector 3 leads to `ring0_entry`, on the vCPU's ring-0 stack; the rest is
    // the caller's word.
    unsafe {
        asm!(
            "int3",
            inout("rax") routine => answer,
            inout("r11") u64::from(MARK) => _,
            inout("rdi") rdi => _,
            inout("rsi") rsi => _,
            out("rcx") _,
            out("rdx") _,
        );
    }
    answer
}
