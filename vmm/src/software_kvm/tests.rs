//! Programs in ring 0 and 3 whose results must be those of a CPU, whichever KVM runs them.
//!
//! On hardware nothing of this module is used, and the same programs show that it need not be.
#![allow(unsafe_code)] // Code between two symbols, read as bytes.

use std::arch::global_asm;
use std::path::Path;
use std::sync::{Arc, Mutex};

use forkvm_abi::EXIT_PORT;
use forkvm_devices::exit::ExitDevice;
use forkvm_devices::{Brake, Bus, Effect, Section};

use super::SoftwareState;
use super::relay::{MSR_CSTAR, MSR_FMASK, MSR_LSTAR, MSR_STAR};
use crate::kvm::{KVM_PATH, Kvm};
use crate::machine::Buses;
use crate::vcpu::{Stop, set_xsave};
use crate::vm::probe_guest::{CODE, FREE, ProbeGuest, Ring};

/// What the guest exits with when it has written all its results.
const DONE: u32 = 0x600d;
/// Where the guest's results lie, and its stack ends.
const RESULTS: u64 = FREE;
const STACK_END: u64 = FREE + 0x2000;

const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXSAVE: u64 = 1 << 18;
const EFER_SCE: u64 = 1;

macro_rules! program {
    ($name:ident, $start:ident, $end:ident, $($line:literal,)*) => {
        global_asm!(
            concat!(".globl ", stringify!($start)),
            concat!(stringify!($start), ":"),
            $($line,)*
            "mov eax, 0x600d",
            "out 0xf4, eax",
            "2: jmp 2b",
            concat!(".globl ", stringify!($end)),
            concat!(stringify!($end), ":"),
        );

        fn $name() -> &'static [u8] {
            unsafe extern "C" {
                static $start: u8;
                static $end: u8;
            }
            // SAFETY: both are labels of one piece of code, in this order.
            unsafe {
                let len = (&raw const $end).offset_from_unsigned(&raw const $start);
                std::slice::from_raw_parts(&raw const $start, len)
            }
        }
    };
}

// RBX: where the next result goes.
program! { bits, forkvm_test_bits, forkvm_test_bits_end,
    "mov ebx, 0x6000",
    "movabs rax, 0xf0f0000000000001",
    "popcnt rcx, rax",
    "mov [rbx], rcx",
    "popcnt cx, ax",
    "mov [rbx + 8], rcx",
    "mov rax, 0",
    "stc",
    "popcnt eax, eax",
    "pushfq",
    "pop qword ptr [rbx + 16]",
    "mov qword ptr [rbx + 0x100], 0x50",
    "popcnt eax, dword ptr [rbx + 0x100]",
    "mov [rbx + 24], rax",
    "mov r9, -1",
    "popcnt r9d, dword ptr [rbx + 0x104]",
    "mov [rbx + 32], r9",
}

program! { pairs, forkvm_test_pairs, forkvm_test_pairs_end,
    "mov ebp, 0x6000",
    "mov qword ptr [rbp + 0x100], 1",
    "mov qword ptr [rbp + 0x108], 2",
    // Equal: stored.
    "mov eax, 1",
    "mov edx, 2",
    "mov ebx, 3",
    "mov ecx, 4",
    "lock cmpxchg16b [rbp + 0x100]",
    "pushfq",
    "pop qword ptr [rbp]",
    // Not equal: loaded.
    "mov eax, 1",
    "mov edx, 2",
    "lock cmpxchg16b [rbp + 0x100]",
    "pushfq",
    "pop qword ptr [rbp + 8]",
    "mov [rbp + 16], rax",
    "mov [rbp + 24], rdx",
}

program! { vectors, forkvm_test_vectors, forkvm_test_vectors_end,
    "mov ebx, 0x6000",
    "mov eax, 3",
    "xor edx, edx",
    "xsave [rbx + 0x40]",
    // Other values for the first and the last of the sixteen registers.
    "mov qword ptr [rbx + 0x40 + 160], 0x1111",
    "mov qword ptr [rbx + 0x40 + 160 + 240], 0x2222",
    "xrstor [rbx + 0x40]",
    "xsave [rbx + 0x440]",
}

program! { controls, forkvm_test_controls, forkvm_test_controls_end,
    "mov ebx, 0x6000",
    "fninit",
    "fnstcw [rbx]",
    "mov word ptr [rbx + 0x100], 0x27f",
    "fldcw [rbx + 0x100]",
    "fnstcw [rbx + 8]",
    "mov dword ptr [rbx + 0x108], 0x1fa0",
    "ldmxcsr [rbx + 0x108]",
    "stmxcsr [rbx + 16]",
    // It is saved and restored, though no vector register was used.
    "mov eax, 3",
    "xor edx, edx",
    "xsave [rbx + 0x140]",
    "mov dword ptr [rbx + 0x108], 0x1f80",
    "ldmxcsr [rbx + 0x108]",
    "xrstor [rbx + 0x140]",
    "stmxcsr [rbx + 24]",
}

// Ring 0 sets SYSCALL up and leaves to ring 3, which comes back by it.
program! { calls, forkvm_test_calls, forkvm_test_calls_end,
    "mov ecx, 0xc0000081",
    "mov edx, 0x00130010",
    "xor eax, eax",
    "wrmsr",
    "mov ecx, 0xc0000084",
    "xor edx, edx",
    "mov eax, 0x400",
    "wrmsr",
    "mov ecx, 0xc0000082",
    "lea rax, [rip + 3f]",
    "mov rdx, rax",
    "shr rdx, 32",
    "wrmsr",
    "rdmsr",
    "mov [0x6000], eax",
    "lea rax, [rip + 3f]",
    "mov [0x6008], eax",
    "lea rcx, [rip + 4f]",
    "mov r11d, 0x3402",
    "sysretq",
    "4:",
    "mov edi, 0",
    "5:",
    "mov eax, cs",
    "mov [0x6010], eax",
    "syscall",
    // After it, in ring 3 again.
    "add edi, 1",
    "cmp edi, 3",
    "jne 5b",
    "mov edi, 99",
    "syscall",
    "3:",
    "mov eax, cs",
    "mov [0x6018], eax",
    "mov [0x6020], rcx",
    "mov [0x6028], r11",
    "pushfq",
    "pop qword ptr [0x6030]",
    "cmp edi, 99",
    "je 6f",
    "sysretq",
    "6:",
    "mov [0x6038], edi",
}

/// A guest with everything that these programs want, or `None` without KVM.
fn guest(program: &[u8]) -> Option<(Arc<Kvm>, ProbeGuest)> {
    if !Path::new(KVM_PATH).exists() {
        println!("skipped: this host has no {KVM_PATH}");
        return None;
    }
    let kvm = Arc::new(Kvm::open().unwrap());
    let mut guest = ProbeGuest::build(&kvm, program, Ring::Kernel).unwrap();
    for page in [FREE, FREE + 0x1000] {
        guest.map(page, page).unwrap();
    }
    if !kvm.promises().unwrap().all() {
        guest.use_software_kvm().unwrap();
    }
    let vcpu = guest.vcpu();
    let mut sregs = *guest.sregs();
    sregs.cr4 |= CR4_OSFXSR | CR4_OSXSAVE;
    sregs.efer |= EFER_SCE;
    vcpu.fd().set_sregs(&sregs).unwrap();
    let mut xcrs = vcpu.fd().get_xcrs().unwrap();
    xcrs.nr_xcrs = 1;
    xcrs.xcrs[0].value = 0b11;
    vcpu.fd().set_xcrs(&xcrs).unwrap();
    let mut regs = vcpu.fd().get_regs().unwrap();
    regs.rsp = STACK_END;
    vcpu.fd().set_regs(&regs).unwrap();
    drop(vcpu);
    Some((kvm, guest))
}

/// Runs it to its end.
fn run(guest: &ProbeGuest) {
    let mut pio = Bus::new(Brake::default());
    let exit = Arc::new(Mutex::new(ExitDevice));
    pio.insert(u64::from(EXIT_PORT), 4, exit).unwrap();
    let buses = Buses {
        pio,
        mmio: Bus::new(Brake::default()),
    };
    match guest.vcpu().run(&buses) {
        Ok(Stop::Effect(Effect::Exit(DONE))) => {}
        other => panic!("{other:?}"),
    }
}

/// Each is counted where it was carried out here, and nothing is where KVM is hardware.
fn expect_counted(kvm: &Arc<Kvm>, guest: &ProbeGuest, mnemonics: &[(&str, u64)]) {
    let counts = guest.fallback_counts();
    if kvm.promises().unwrap().all() {
        assert_eq!(counts, None);
        return;
    }
    let expected = mnemonics
        .iter()
        .map(|(name, count)| ((*name).to_owned(), *count));
    assert_eq!(counts, Some(expected.collect()));
}

fn result(guest: &ProbeGuest, index: u64) -> u64 {
    guest.read(RESULTS + 8 * index)
}

const CF: u64 = 1;
const ZF: u64 = 1 << 6;
const DF: u64 = 1 << 10;

#[test]
fn bits_are_counted_in_ring_0_as_a_cpu_counts_them() {
    let Some((kvm, guest)) = guest(bits()) else {
        return;
    };
    run(&guest);
    assert_eq!(result(&guest, 0), 9);
    assert_eq!(result(&guest, 1), 1, "the low half alone was written");
    assert_eq!(result(&guest, 2) & (CF | ZF), ZF);
    assert_eq!(result(&guest, 3), 2);
    assert_eq!(result(&guest, 4), 0, "the upper half is cleared");
    expect_counted(&kvm, &guest, &[("popcnt", 5)]);
}

#[test]
fn sixteen_bytes_are_compared_and_exchanged_in_ring_0() {
    let Some((kvm, guest)) = guest(pairs()) else {
        return;
    };
    run(&guest);
    assert_eq!(result(&guest, 0) & ZF, ZF);
    assert_eq!(result(&guest, 1) & ZF, 0);
    assert_eq!((result(&guest, 2), result(&guest, 3)), (3, 4));
    assert_eq!((result(&guest, 32), result(&guest, 33)), (3, 4));
    expect_counted(&kvm, &guest, &[("cmpxchg16b", 2)]);
}

#[test]
fn ring_0_saves_and_restores_vector_registers() {
    let Some((kvm, guest)) = guest(vectors()) else {
        return;
    };
    {
        let vcpu = guest.vcpu();
        let mut area = vec![0; 576];
        area[..2].copy_from_slice(&0x37fu16.to_le_bytes());
        area[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        for (index, register) in (1..).zip(area[160..416].chunks_mut(16)) {
            register.fill(index);
        }
        // Both components are in use.
        area[512] = 0b11;
        set_xsave(vcpu.fd(), 4096, &area).unwrap();
    }
    run(&guest);
    let register = |area: u64, index: u64| guest.read(RESULTS + area + 160 + 16 * index);
    for index in 0..16 {
        let held = u64::from_le_bytes([index as u8 + 1; 8]);
        let changed = match index {
            0 => 0x1111,
            15 => 0x2222,
            _ => held,
        };
        assert_eq!(register(0x440, index), changed, "register {index}");
    }
    let fpu = guest.vcpu().fd().get_fpu().unwrap();
    assert_eq!(fpu.xmm[0][..8], 0x1111u64.to_le_bytes());
    assert_eq!(fpu.xmm[1], [2; 16]);
    expect_counted(&kvm, &guest, &[("xsave", 2), ("xrstor", 1)]);
}

#[test]
fn ring_0_sets_and_keeps_the_control_words_of_x87_and_sse() {
    let Some((kvm, guest)) = guest(controls()) else {
        return;
    };
    run(&guest);
    assert_eq!(result(&guest, 0) as u16, 0x37f);
    assert_eq!(result(&guest, 1) as u16, 0x27f);
    assert_eq!(result(&guest, 2) as u32, 0x1fa0);
    assert_eq!(result(&guest, 3) as u32, 0x1fa0);
    let counts = guest.fallback_counts();
    assert_eq!(
        counts.is_none(),
        kvm.promises().unwrap().all(),
        "{counts:?}"
    );
}

#[test]
fn syscall_enters_ring_0_at_the_guests_own_entry() {
    let Some((kvm, guest)) = guest(calls()) else {
        return;
    };
    run(&guest);
    assert_eq!(
        result(&guest, 0),
        result(&guest, 1),
        "the guest reads back its own entry"
    );
    assert_eq!(result(&guest, 2) & 3, 3, "it was called from ring 3");
    assert_eq!(result(&guest, 3), 0x10);
    let called_from = CODE..CODE + 0x1000;
    assert!(called_from.contains(&result(&guest, 4)));
    assert_eq!(result(&guest, 5) & DF, DF, "R11 holds the flags of before");
    assert_eq!(result(&guest, 6) & DF, 0, "they are masked in ring 0");
    assert_eq!(result(&guest, 7), 99);
    expect_counted(&kvm, &guest, &[]);
}

#[test]
fn an_instruction_that_nobody_carries_out_ends_the_vm_with_its_bytes() {
    // vpaddd ymm0, ymm0, ymm0
    const CODE_BYTES: [u8; 4] = [0xc5, 0xfd, 0xfe, 0xc0];
    let Some((kvm, guest)) = guest(&CODE_BYTES) else {
        return;
    };
    if kvm.promises().unwrap().all() {
        return;
    }
    let buses = Buses {
        pio: Bus::new(Brake::default()),
        mmio: Bus::new(Brake::default()),
    };
    let error = guest.vcpu().run(&buses).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("0x5000") && text.contains("c5 fd fe c0"),
        "{text}"
    );
}

/// Section `kvm/software` of a machine whose second vCPU has not turned SYSCALL on.
#[test]
fn a_section_of_version_1_is_read_and_written_as_ever() {
    let golden = include_bytes!("../../tests/golden/kvm-software-v1.cbor");
    let section = Section {
        kind: "kvm/software".into(),
        version: 1,
        body: golden.to_vec(),
    };
    let state: SoftwareState = section.decode().unwrap();
    assert_eq!(state.vcpus.len(), 2);
    let msrs = |vcpu: usize| {
        [MSR_STAR, MSR_LSTAR, MSR_CSTAR, MSR_FMASK].map(|msr| state.vcpus[vcpu].msr_read(msr))
    };
    assert_eq!(
        msrs(0),
        [
            0x23_0010_0000_0000,
            0xffff_ffff_8180_0000,
            0xffff_ffff_8180_1000,
            0x4_7700
        ]
        .map(Some)
    );
    assert_eq!(msrs(1), [Some(0); 4]);
    assert_eq!(Section::encode("kvm/software", &state).unwrap(), section);
}
