//! The network of a machine with itself: 127.0.0.1 answers once `lo` is up, which no kernel does by itself.

#![allow(unsafe_code)] // Flags of an interface are set by an ioctl on a C struct.

use std::io;
use std::mem::zeroed;
use std::os::fd::AsRawFd;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

/// Brings `lo` up.
///
/// # Errors
/// The kernel's: it may have no IPv4.
pub(super) fn bring_up() -> io::Result<()> {
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, flags, None)?;
    // SAFETY: a struct of integers and a union of such.
    let mut request: libc::ifreq = unsafe { zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as libc::c_char;
    }
    // SAFETY: reads the name of the struct and writes its flags.
    let got = unsafe {
        libc::ioctl(
            socket.as_raw_fd(),
            libc::SIOCGIFFLAGS as _,
            &raw mut request,
        )
    };
    if got != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the flags are what the kernel has just written into the union.
    unsafe { request.ifr_ifru.ifru_flags |= libc::IFF_UP as libc::c_short };
    // SAFETY: reads the name and the flags of the struct.
    let set = unsafe {
        libc::ioctl(
            socket.as_raw_fd(),
            libc::SIOCSIFFLAGS as _,
            &raw mut request,
        )
    };
    match set {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::thread;

    use super::*;

    /// Whether something that is sent to 127.0.0.1 arrives.
    fn reaches_itself() -> io::Result<()> {
        let socket = UdpSocket::bind("127.0.0.1:0")?;
        socket.send_to(b"x", socket.local_addr()?)?;
        socket.recv(&mut [0]).map(drop)
    }

    #[test]
    fn a_machine_reaches_itself_over_the_network() {
        let alone = thread::spawn(|| {
            // SAFETY: this thread alone has another network from here on, and it ends with the test.
            if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
                return eprintln!("skipped: only root makes a network of its own");
            }
            assert!(reaches_itself().is_err());
            bring_up().unwrap();
            reaches_itself().unwrap();
        });
        alone.join().unwrap();
    }
}
