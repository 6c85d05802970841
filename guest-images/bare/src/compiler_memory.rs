//! `memcpy` and its kin, which compiled Rust calls and no library provides here.
//!
//! In assembly, so that the compiler cannot turn their loops into calls of themselves.

#![allow(unsafe_code)] // Raw memory by definition.

use core::arch::asm;

/// From this length on `rep movsb` and `rep stosb` are the fastest way on every current CPU.
const REP_FROM: usize = 128;

/// C's `memcpy`.
///
/// # Safety
/// As in C: `n` readable bytes at `from`, `n` writable ones at `to`, not overlapping.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, n: usize) -> *mut u8 {
    // SAFETY: copies exactly the bytes that the caller vouches for.
    unsafe {
        if n < REP_FROM {
            copy_up(to, from, n);
        } else {
            asm!("rep movsb", inout("rcx") n => _, inout("rdi") to => _, inout("rsi") from => _,
                options(nostack, preserves_flags));
        }
    }
    to
}

/// C's `memmove`.
///
/// # Safety
/// As in C: `n` readable bytes at `from`, `n` writable ones at `to`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, n: usize) -> *mut u8 {
    // SAFETY: copies exactly the bytes that the caller vouches for, from the end when the
    // destination starts within the source.
    unsafe {
        if to.addr().wrapping_sub(from.addr()) >= n {
            return memcpy(to, from, n);
        }
        copy_down(to, from, n);
    }
    to
}

/// C's `memset`.
///
/// # Safety
/// As in C: `n` writable bytes at `to`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, n: usize) -> *mut u8 {
    // SAFETY: writes exactly the bytes that the caller vouches for.
    unsafe {
        asm!("rep stosb", inout("rcx") n => _, inout("rdi") to => _, in("al") byte as u8,
            options(nostack, preserves_flags));
    }
    to
}

/// C's `memcmp`.
///
/// # Safety
/// As in C: `n` readable bytes at `a` and at `b`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
    let (mut left, mut right): (u32, u32) = (0, 0);
    // SAFETY: reads at most the bytes that the caller vouches for.
    unsafe {
        asm!(
            "test {n}, {n}",
            "jz 3f",
            "2:",
            "movzx {left:e}, byte ptr [{a} + {i}]",
            "movzx {right:e}, byte ptr [{b} + {i}]",
            "cmp {left:e}, {right:e}",
            "jne 3f",
            "inc {i}",
            "cmp {i}, {n}",
            "jb 2b",
            "3:",
            a = in(reg) a, b = in(reg) b, n = in(reg) n, i = inout(reg) 0usize => _,
            left = inout(reg) left, right = inout(reg) right,
            options(nostack, readonly),
        );
    }
    left as i32 - right as i32
}

/// `memcmp` of which only zero or not zero counts.
///
/// # Safety
/// As for [`memcmp`].
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
    // SAFETY: the caller's word is what `memcmp` needs.
    unsafe { memcmp(a, b, n) }
}

/// C's `strlen`.
///
/// # Safety
/// As in C: `string` is readable up to a zero byte.
#[unsafe(no_mangle)]
unsafe extern "C" fn strlen(string: *const u8) -> usize {
    let mut length = 0usize;
    // SAFETY: reads up to the zero byte that the caller vouches for.
    unsafe {
        asm!(
            "jmp 3f",
            "2: inc {length}",
            "3: cmp byte ptr [{string} + {length}], 0",
            "jne 2b",
            string = in(reg) string, length = inout(reg) length,
            options(nostack, readonly),
        );
    }
    length
}

/// Copies upwards, eight bytes at a time and the rest singly.
///
/// # Safety
/// As for [`memcpy`].
#[inline(always)]
unsafe fn copy_up(to: *mut u8, from: *const u8, n: usize) {
    // SAFETY: copies exactly the bytes that the caller vouches for.
    unsafe {
        asm!(
            "sub {n}, 8",
            "jb 3f",
            "2:",
            "mov {word}, [{from} + {i}]",
            "mov [{to} + {i}], {word}",
            "add {i}, 8",
            "cmp {i}, {n}",
            "jbe 2b",
            "3:",
            "add {n}, 8",
            "jmp 5f",
            "4:",
            "mov {word:l}, [{from} + {i}]",
            "mov [{to} + {i}], {word:l}",
            "inc {i}",
            "5:",
            "cmp {i}, {n}",
            "jb 4b",
            to = in(reg) to, from = in(reg) from, n = inout(reg) n => _,
            i = inout(reg) 0usize => _, word = out(reg) _,
            options(nostack),
        );
    }
}

/// Copies downwards, for a destination that starts within the source.
///
/// # Safety
/// As for [`memmove`].
unsafe fn copy_down(to: *mut u8, from: *const u8, n: usize) {
    // SAFETY: copies exactly the bytes that the caller vouches for. A word is loaded before it is
    // stored, and every later word lies below it, so an overlap of any distance is right.
    unsafe {
        asm!(
            "cmp {n}, 8",
            "jb 3f",
            "2:",
            "mov {word}, [{from} + {n} - 8]",
            "mov [{to} + {n} - 8], {word}",
            "sub {n}, 8",
            "cmp {n}, 8",
            "jae 2b",
            "3:",
            "test {n}, {n}",
            "jz 5f",
            "4:",
            "mov {word:l}, [{from} + {n} - 1]",
            "mov [{to} + {n} - 1], {word:l}",
            "dec {n}",
            "jnz 4b",
            "5:",
            to = in(reg) to, from = in(reg) from, n = inout(reg) n => _, word = out(reg) _,
            options(nostack),
        );
    }
}
