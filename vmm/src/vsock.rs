//! A machine's vsock device, its thread, and where both meet the host.
//!
//! The device is `forkvm_devices::virtio::vsock`; what is here is when its thread lives: from a state in
//! place to just before the memory goes. The brake, pulled until the start and in each pause, keeps it
//! from guest memory whenever the machine stands. Used by [`Machine`](crate::machine::Machine).

use std::io;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use forkvm_devices::virtio::mmio::MmioTransport;
use forkvm_devices::virtio::vsock::{Cid, SocketThread, UnixBackend, UnixVsock, Vsock};
use forkvm_devices::{Brake, GuestMemory, InterruptLine};

use crate::machine::lock;

/// The host's side of a machine's vsock device.
#[derive(Debug)]
pub struct VsockHost {
    /// The machine's own CID, also where a state brings another one's.
    pub cid: Cid,
    /// Where programs of the host connect, each with `CONNECT PORT\n` as its first line.
    pub listener: UnixListener,
    /// A guest's connect to port P of the host goes to the Unix socket at this path with `_P` behind it.
    pub prefix: PathBuf,
}

/// See the module's text.
pub(crate) struct MachineVsock {
    // The thread ends before the device goes.
    thread: Option<SocketThread>,
    device: UnixVsock,
    cid: Cid,
    /// Until the thread has it.
    listener: Option<UnixListener>,
}

impl MachineVsock {
    pub(crate) fn new(
        host: VsockHost,
        memory: GuestMemory,
        line: Arc<dyn InterruptLine>,
        brake: Brake,
    ) -> io::Result<MachineVsock> {
        let VsockHost {
            cid,
            listener,
            prefix,
        } = host;
        let model = Vsock::new(cid, Some(UnixBackend::new(Some(prefix))?));
        let device = MmioTransport::new("vsock".into(), model, memory, line, brake);
        Ok(MachineVsock {
            thread: None,
            device: Arc::new(Mutex::new(device)),
            cid,
            listener: Some(listener),
        })
    }

    /// The device, for its bus.
    pub(crate) fn device(&self) -> UnixVsock {
        self.device.clone()
    }

    /// Gives the device its own CID again, after a state brought that of the machine it was saved in.
    pub(crate) fn identify(&self) {
        lock(&self.device).model_mut().set_cid(self.cid);
    }

    /// Begins to hear the host's programs. The state is in place, and the brake is pulled until the
    /// machine starts.
    pub(crate) fn listen(&mut self) -> io::Result<()> {
        let listener = self.listener.take();
        self.thread = Some(SocketThread::start(self.device(), listener)?);
        Ok(())
    }

    /// Ends the thread, which may be in the middle of an access to guest memory.
    pub(crate) fn end(&mut self) {
        self.thread = None;
    }
}
