//! What of AF_VSOCK neither the standard library nor rustix has: a listener, and the machine's address.

#![allow(unsafe_code)] // The address of a vsock socket is a C struct; an ioctl.

use std::fs::File;
use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType, accept_with, listen, socket_with};

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

    pub(crate) fn accept(&self) -> io::Result<OwnedFd> {
        Ok(accept_with(self.socket.as_fd(), SocketFlags::CLOEXEC)?)
    }
}
