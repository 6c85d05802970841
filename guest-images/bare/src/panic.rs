//! The end of a guest that went wrong: its last words on the console, and exit status 255.

#![allow(unsafe_code)] // Names that the linker looks for.

use core::panic::PanicInfo;

use crate::machine;
use crate::serial;

/// Exit status of a guest that met a panic or a CPU exception.
const STATUS: u32 = 255;

/// Where a CPU exception arrives, in ring 3 on a stack of its own.
pub extern "C" fn exception(vector: u64, error: u64, rip: u64, cr2: u64, rsp: u64) -> ! {
    serial::print_last_words(format_args!(
        "\nexception {vector} error={error:#x} rip={rip:#x} cr2={cr2:#x} rsp={rsp:#x}\n"
    ));
    machine::exit(STATUS)
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    serial::print_last_words(format_args!("\n{info}\n"));
    machine::exit(STATUS)
}

/// The clean-up code of the precompiled `alloc` ends in this call. Panics here end the machine, so
/// none of that code ever runs; the linker wants the name.
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    machine::exit(STATUS)
}
