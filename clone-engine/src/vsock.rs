//! The host's ends of the VMs' socket devices: for each VM a CID and a Unix socket.
//!
//! The sockets of a family lie beside each other: the VM that was started has the path of its
//! [`VsockSpec`], a clone that path with a dot and its numbers behind it, like its name. A socket's file
//! is there as long as its VM, in whichever process that lives; one that a killed process left behind is
//! replaced. `docs/vsock.md` says what is spoken there.

use std::ffi::OsString;
use std::fs;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use forkvm_devices::virtio::vsock::Cid;
use forkvm_vmm::VsockHost;

use crate::identity::Identity;

/// Where the socket devices of a family meet the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VsockSpec {
    /// The Unix socket of the VM that is booted or restored. Nothing may be there but a socket that
    /// nobody listens on.
    pub path: PathBuf,
}

impl VsockSpec {
    /// The Unix socket of `vm`, which is of the family that has this.
    pub fn path_of(&self, vm: &Identity) -> PathBuf {
        // A name may have dots of its own, so its numbers are counted from behind.
        let numbers = vm
            .name
            .rmatch_indices('.')
            .take(vm.depth as usize)
            .last()
            .map_or("", |(at, _)| &vm.name[at..]);
        let mut path = OsString::from(&self.path);
        path.push(numbers);
        path.into()
    }
}

/// The CIDs of a family, each given once. Where they begin is left to chance: so a machine that is restored
/// gets another one than it had, by which its driver is seen to have heard of that.
#[derive(Debug)]
pub(crate) struct Cids(AtomicU32);

impl Default for Cids {
    fn default() -> Cids {
        let random = RandomState::new().build_hasher().finish() as u32;
        // 0 to 2 are reserved (virtio 1.2 section 5.10.4), and there is room for as many as there can be.
        Cids(AtomicU32::new(3 + random / 2))
    }
}

impl Cids {
    /// The next one.
    pub(crate) fn next(&self) -> u32 {
        self.0.fetch_add(1, Ordering::Relaxed)
    }
}

/// The host's end of one VM's socket device.
#[derive(Debug)]
pub(crate) struct VsockEnd {
    cid: Cid,
    listener: UnixListener,
    prefix: PathBuf,
    /// Not in a worker: there the engine has it.
    _file: Option<SocketFile>,
}

impl VsockEnd {
    /// That of the VM `identity`, which has a CID. Makes its socket.
    pub(crate) fn open(spec: &VsockSpec, identity: &Identity) -> io::Result<VsockEnd> {
        let path = spec.path_of(identity);
        let listener = listen(&path).map_err(|error| {
            let text = format!("listening on the Unix socket {}: {error}", path.display());
            io::Error::new(error.kind(), text)
        })?;
        let file = SocketFile(path.clone());
        Ok(VsockEnd {
            cid: cid_of(identity)?,
            listener,
            prefix: path,
            _file: Some(file),
        })
    }

    /// The same of a VM whose socket another process has made.
    pub(crate) fn adopt(
        socket: OwnedFd,
        prefix: PathBuf,
        identity: &Identity,
    ) -> io::Result<VsockEnd> {
        Ok(VsockEnd {
            cid: cid_of(identity)?,
            listener: UnixListener::from(socket),
            prefix,
            _file: None,
        })
    }

    /// For one VM object.
    pub(crate) fn host(&self) -> io::Result<VsockHost> {
        Ok(VsockHost {
            cid: self.cid,
            listener: self.listener.try_clone()?,
            prefix: self.prefix.clone(),
        })
    }

    /// What a process needs besides to [adopt](VsockEnd::adopt) it: the socket, and its path.
    pub(crate) fn parts(&self) -> (&UnixListener, &Path) {
        (&self.listener, &self.prefix)
    }
}

fn cid_of(identity: &Identity) -> io::Result<Cid> {
    let number = identity.cid.map_or(0, u64::from);
    Cid::new(number).map_err(io::Error::other)
}

/// Listens at `path`, where there may be a socket of a process that is gone.
fn listen(path: &Path) -> io::Result<UnixListener> {
    match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_dead(path) => {
            fs::remove_file(path)?;
            UnixListener::bind(path)
        }
        other => other,
    }
}

fn is_dead(path: &Path) -> bool {
    // A connect to a file that is no socket is refused as well.
    let is_socket = fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
    let refused = |error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
    is_socket && UnixStream::connect(path).is_err_and(refused)
}

/// A socket's file, which goes with its VM.
#[derive(Debug)]
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        match fs::remove_file(&self.0) {
            Ok(()) => {}
            // With the directory that it was in.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                tracing::warn!(%error, path = %self.0.display(), "a VM's socket stays behind");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(name: &str, depth: u32) -> Identity {
        Identity {
            depth,
            name: name.to_owned(),
            ..Identity::root("any").unwrap()
        }
    }

    #[test]
    fn the_sockets_of_a_family_lie_beside_each_other_under_the_numbers_of_its_clones() {
        let path = PathBuf::from("/run/x.sock");
        let of = |name, depth| VsockSpec { path: path.clone() }.path_of(&identity(name, depth));
        assert_eq!(of("web.v2", 0), Path::new("/run/x.sock"));
        assert_eq!(of("web.v2.7", 1), Path::new("/run/x.sock.7"));
        assert_eq!(of("web.v2.7.12", 2), Path::new("/run/x.sock.7.12"));
    }

    #[test]
    fn a_socket_that_somebody_listens_on_is_left_to_him_and_a_dead_one_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vsock");
        let first = listen(&path).unwrap();
        assert_eq!(listen(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(first);
        listen(&path).unwrap();
    }

    #[test]
    fn what_is_no_socket_is_never_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("precious");
        fs::write(&path, "text").unwrap();
        listen(&path).unwrap_err();
        assert_eq!(fs::read(&path).unwrap(), b"text");
    }

    #[test]
    fn the_file_of_a_socket_goes_with_its_vm() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vsock");
        let spec = VsockSpec { path: path.clone() };
        let vm = Identity {
            cid: Some(3),
            ..identity("vm", 0)
        };
        let end = VsockEnd::open(&spec, &vm).unwrap();
        assert!(path.exists());
        drop(end);
        assert!(!path.exists());
    }
}
