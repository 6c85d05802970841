//! The kernel's random numbers, from here on others than those of any other machine.

#![allow(unsafe_code)] // An ioctl with a struct that ends in an array.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsRawFd;

/// Takes bytes into the pool and counts them as random (random(4)).
const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;

/// Makes the generator take its next key from the pool now (since Linux 4.14).
const RNDRESEEDCRNG: libc::Ioctl = 0x5207;

/// Bytes of one call.
const CHUNK: usize = 256;

/// `struct rand_pool_info`.
#[repr(C)]
struct PoolInfo {
    /// In bits.
    entropy: i32,
    /// In bytes.
    length: i32,
    bytes: [u8; CHUNK],
}

/// Mixes `entropy`, all of it secret and random, into the pool, and has the generator use it.
pub(super) fn reseed(entropy: &[u8]) -> io::Result<()> {
    let device = OpenOptions::new().write(true).open("/dev/urandom")?;
    for chunk in entropy.chunks(CHUNK) {
        let mut info = PoolInfo {
            entropy: chunk.len() as i32 * 8,
            length: chunk.len() as i32,
            bytes: [0; CHUNK],
        };
        info.bytes[..chunk.len()].copy_from_slice(chunk);
        // SAFETY: the kernel reads the two lengths, and as many bytes behind them as the second says: all within `info`.
        let added = unsafe { libc::ioctl(device.as_raw_fd(), RNDADDENTROPY, &raw const info) };
        if added != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    // SAFETY: this call takes no argument.
    match unsafe { libc::ioctl(device.as_raw_fd(), RNDRESEEDCRNG) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
