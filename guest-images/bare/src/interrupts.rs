//! The local APIC, the I/O APIC, and a counter for every interrupt line.
//!
//! A line's handler in ring 0 counts and acknowledges, and nothing else: whoever waits for a line
//! looks at its counter ([`wait_for`]). All lines go to the first vCPU; only it writes counters.

#![allow(unsafe_code)] // Interrupt entry code and device registers.

use core::arch::global_asm;
use core::ptr::with_exposed_provenance_mut;
use core::sync::atomic::{AtomicU32, Ordering};

use crate::descriptors::{self, STUB_STRIDE};
use crate::{port, ring0};

/// Interrupt lines of the I/O APIC.
const LINES: usize = 24;
/// Vector of line 0.
const LINE_VECTOR: usize = 0x20;
/// Vector that wakes a halted vCPU and does nothing else.
const WAKE_VECTOR: usize = 0xf0;
/// Vector of the local APIC's spurious interrupts.
const SPURIOUS_VECTOR: usize = 0xff;

/// Local APIC registers (Intel SDM volume 3, table 11-1).
const LAPIC: usize = 0xfee0_0000;
const LAPIC_ID: usize = 0x20;
const LAPIC_SPURIOUS: usize = 0xf0;
const LAPIC_ICR_LOW: usize = 0x300;
const LAPIC_ICR_HIGH: usize = 0x310;
const LAPIC_LVT_LINT0: usize = 0x350;
const LVT_MASKED: u32 = 1 << 16;
const SOFTWARE_ENABLE: u32 = 1 << 8;
const ICR_PENDING: u32 = 1 << 12;
const ICR_ASSERT: u32 = 1 << 14;
const ICR_ALL_OTHERS: u32 = 3 << 18;
const ICR_INIT: u32 = 5 << 8;
const ICR_STARTUP: u32 = 6 << 8;

/// I/O APIC registers (82093AA data sheet, section 3).
const IOAPIC_SELECT: usize = 0xfec0_0000;
const IOAPIC_WINDOW: usize = 0xfec0_0010;
const IOAPIC_REDIRECTION: u32 = 0x10;

/// Data ports of the two 8259 interrupt controllers, where a 1 masks a line.
const PIC_MASKS: [u16; 2] = [0x21, 0xa1];

/// How often each line has interrupted since boot, forks included.
static COUNTS: [AtomicU32; LINES] = [const { AtomicU32::new(0) }; LINES];

/// Interrupts of any vCPU since boot, wake-ups included.
static TOTAL: AtomicU32 = AtomicU32::new(0);

global_asm!(
    r#"
    .section .text, "ax", @progbits
    .balign 16
line_stubs:
    .set line, 0
    .rept {lines}
    .balign {stub_stride}
    inc dword ptr [rip + {counts} + 4 * line]
    jmp acknowledge
    .set line, line + 1
    .endr

acknowledge:
    lock inc dword ptr [rip + {total}]
    push rax
    mov eax, 0xfee000b0             # EOI of the local APIC
    mov dword ptr [rax], 0
    pop rax
spurious:
    iretq
    "#,
    lines = const LINES,
    stub_stride = const STUB_STRIDE,
    counts = sym COUNTS,
    total = sym TOTAL,
);

unsafe extern "C" {
    static line_stubs: u8;
    static acknowledge: u8;
    static spurious: u8;
}

/// Sets up the first vCPU's interrupts and turns them on. No line is routed yet.
pub fn enable() {
    let stubs = (&raw const line_stubs).addr();
    for line in 0..LINES {
        descriptors::set_interrupt(LINE_VECTOR + line, stubs + line * STUB_STRIDE);
    }
    descriptors::set_interrupt(WAKE_VECTOR, (&raw const acknowledge).addr());
    descriptors::set_interrupt(SPURIOUS_VECTOR, (&raw const spurious).addr());
    PIC_MASKS.iter().for_each(|&mask| port::write8(mask, 0xff));
    enable_local();
    // On the first vCPU this pin is where an 8259 would come in.
    lapic_write(LAPIC_LVT_LINT0, LVT_MASKED);
    ring0::enable_interrupts();
}

/// Turns on the local APIC of the calling vCPU.
pub fn enable_local() {
    lapic_write(LAPIC_SPURIOUS, SOFTWARE_ENABLE | SPURIOUS_VECTOR as u32);
}

/// Lets the edge-triggered line `gsi` interrupt the calling vCPU, which is the first.
pub fn route(gsi: u32) {
    let entry = IOAPIC_REDIRECTION + 2 * gsi;
    ioapic_write(entry + 1, lapic_id() << 24);
    // Fixed delivery, physical destination, active high, edge, not masked.
    ioapic_write(entry, LINE_VECTOR as u32 + gsi);
}

/// How often line `gsi` has interrupted.
pub fn count(gsi: u32) -> u32 {
    COUNTS[gsi as usize].load(Ordering::Acquire)
}

/// Halts the calling vCPU, which is the first, until line `gsi` has interrupted more than `seen`
/// times in all.
pub fn wait_for(gsi: u32, seen: u32) {
    while count(gsi) == seen {
        ring0::wait_while(&COUNTS[gsi as usize], seen);
    }
}

/// Interrupts of any vCPU since boot, wake-ups included.
pub fn total() -> u32 {
    TOTAL.load(Ordering::Acquire)
}

/// Halts the calling vCPU until it is interrupted, unless [`total`] is no longer `seen`.
pub fn wait_for_any(seen: u32) {
    ring0::wait_while(&TOTAL, seen);
}

/// Halts the calling vCPU for good.
pub fn halt() -> ! {
    loop {
        wait_for_any(total());
    }
}

/// Physical id of the calling vCPU's local APIC.
pub fn lapic_id() -> u32 {
    lapic_read(LAPIC_ID) >> 24
}

/// Ends the HLT of the vCPU with local APIC `id`, or the next one that it is about to enter.
pub fn wake(id: u32) {
    lapic_write(LAPIC_ICR_HIGH, id << 24);
    send(ICR_ASSERT | WAKE_VECTOR as u32);
}

/// [`wake`]s every other vCPU.
pub fn wake_all_others() {
    send(ICR_ALL_OTHERS | ICR_ASSERT | WAKE_VECTOR as u32);
}

/// Starts every other vCPU, in real mode at the page `address` (below 1 MiB).
pub fn start_all_others(address: usize) {
    send(ICR_ALL_OTHERS | ICR_ASSERT | ICR_INIT);
    let startup = ICR_ALL_OTHERS | ICR_ASSERT | ICR_STARTUP | (address >> 12) as u32;
    // Twice, as Intel's SDM (volume 3, chapter 9.4.4) has it; a running vCPU ignores the second.
    send(startup);
    send(startup);
}

fn send(command: u32) {
    lapic_write(LAPIC_ICR_LOW, command);
    while lapic_read(LAPIC_ICR_LOW) & ICR_PENDING != 0 {
        core::hint::spin_loop();
    }
}

/// Reads a register of the calling vCPU's local APIC.
pub fn lapic_read(register: usize) -> u32 {
    // SAFETY: a 32-bit register of a device that is mapped and always there.
    unsafe { with_exposed_provenance_mut::<u32>(LAPIC + register).read_volatile() }
}

/// Writes a register of the calling vCPU's local APIC.
pub fn lapic_write(register: usize, value: u32) {
    // SAFETY: a 32-bit register of a device that is mapped and always there; it touches no memory.
    unsafe { with_exposed_provenance_mut::<u32>(LAPIC + register).write_volatile(value) };
}

fn ioapic_write(register: u32, value: u32) {
    // SAFETY: as for the local APIC; only the first vCPU comes here, so the pair is not torn.
    unsafe {
        with_exposed_provenance_mut::<u32>(IOAPIC_SELECT).write_volatile(register);
        with_exposed_provenance_mut::<u32>(IOAPIC_WINDOW).write_volatile(value);
    }
}
