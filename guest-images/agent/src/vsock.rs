//! What of AF_VSOCK neither the standard library nor rustix has: a listener, and the machine's address.

#![allow(unsafe_code)] // The address of a vsock socket is a C struct; an ioctl.

use std::fs::File;
use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType, listen, socket_with};

/// IOCTL_VM_SOCKETS_GET_LOCAL_CID of linux/vm_sockets.h.
const GET_LOCAL_CID: libc::c_ulong = 0x7b9;

/// The address that the driver has for this machine; `None` without a device.
pub(crate) fn address() -> io::Result<Option<u64>> {
    let device = match File::open("/dev/vsock") {
        Ok(device) => device,
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::ENOENT | libc::ENODEV | libc::ENXIO)
            ) =>
        {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    let mut cid: libc::c_uint = 0;
    // SAFETY: the ioctl writes an unsigned int to where the pointer leads.
    let got = unsafe { libc::ioctl(device.as_raw_fd(), GET_LOCAL_CID, &raw mut cid) };
    match got {
        0.. => Ok(Some(cid.into())),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Sessions that wait to be let in.
const BACKLOG: i32 = 32;

/// A listener on all addresses of this machine: its CID changes when it is cloned.
pub(crate) struct VsockListener {
    socket: OwnedFd,
}

impl VsockListener {
    pub(crate) fn bind(port: u32) -> io::Result<VsockListener> {
        let socket = socket_with(
            AddressFamily::VSOCK,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )?;
        // SAFETY: a struct of integers.
        let mut address: libc::sockaddr_vm = unsafe { zeroed() };
        address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
        address.svm_cid = libc::VMADDR_CID_ANY;
        address.svm_port = port;
        let length = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
        // SAFETY: the address lives through the call and has the length that is given.
        let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
        if bound != 0 {
            return Err(io::Error::last_os_error());
        }
        listen(&socket, BACKLOG)?;
        Ok(VsockListener { socket })
    }

    /// The next stream of the host. Programs of this machine (VMADDR_CID_LOCAL) and of machines within it reach the port
    /// as well, and have no business here: they are hung up on.
    pub(crate) fn accept(&self) -> io::Result<OwnedFd> {
        loop {
            let (stream, cid) = self.accept_any()?;
            if cid == libc::VMADDR_CID_HOST {
                return Ok(stream);
            }
            crate::log::line(&format!("vsock address {cid} is not the host: turned away"));
        }
    }

    /// The next stream, and the address that it comes from.
    fn accept_any(&self) -> io::Result<(OwnedFd, u32)> {
        // SAFETY: a struct of integers.
        let mut peer: libc::sockaddr_vm = unsafe { zeroed() };
        let mut length = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
        // SAFETY: the address lives through the call and has the length that is given; no more is written.
        let accepted = unsafe {
            libc::accept4(
                self.socket.as_raw_fd(),
                (&raw mut peer).cast(),
                &raw mut length,
                libc::SOCK_CLOEXEC,
            )
        };
        if accepted < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call made it, and nobody else has it.
        let stream = unsafe { OwnedFd::from_raw_fd(accepted) };
        Ok((stream, peer.svm_cid))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::sync::mpsc::channel;
    use std::thread;
    use std::time::Duration;

    use rustix::net::sockopt::{Timeout, set_socket_timeout};

    use super::*;

    /// A stream from this machine to itself; `None` where its kernel has no such thing.
    fn connect_to_itself(port: u32) -> Option<File> {
        let flags = SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::VSOCK, SocketType::STREAM, flags, None).ok()?;
        // SAFETY: a struct of integers.
        let mut address: libc::sockaddr_vm = unsafe { zeroed() };
        address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
        address.svm_cid = libc::VMADDR_CID_LOCAL;
        address.svm_port = port;
        let length = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
        // SAFETY: the address lives through the call and has the length that is given.
        let connected =
            unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), length) };
        (connected == 0).then(|| File::from(socket))
    }

    #[test]
    fn a_program_of_the_machine_itself_is_not_taken_for_its_host() {
        // No agent's port, and nobody else's by any likelihood.
        let port = 0x4000_0000 | std::process::id();
        let Ok(listener) = VsockListener::bind(port) else {
            return eprintln!("skipped: no vsock");
        };
        let (let_in, is_let_in) = channel();
        thread::spawn(move || let_in.send(listener.accept()));
        let Some(mut stream) = connect_to_itself(port) else {
            return eprintln!("skipped: no vsock within this machine");
        };
        set_socket_timeout(&stream, Timeout::Recv, Some(Duration::from_secs(60))).unwrap();
        let heard = stream.read(&mut [0]).map_err(|error| error.kind());
        assert!(
            matches!(heard, Ok(0) | Err(io::ErrorKind::ConnectionReset)),
            "{heard:?} is no hanging up"
        );
        assert!(is_let_in.try_recv().is_err());
    }
}
