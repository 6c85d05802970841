//! An AF_VSOCK listener: the one socket that neither the standard library nor rustix has.

#![allow(unsafe_code)] // The address of a vsock socket is a C struct.

use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType, accept_with, listen, socket_with};

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
