//! What of the host is attached to a VM: disks, and its end of a vsock.
//!
//! Given by whoever starts the VM, kept by the thread that serves it until the VM is gone, and put into
//! each VM object that it has in its lives.

use std::io::{self, Write};
use std::sync::Arc;

use forkvm_vmm::Peripherals;

use crate::disks::DiskSource;
use crate::vsock::VsockEnd;

/// See the module's text.
#[derive(Clone)]
pub(crate) struct Attached {
    /// In the order of the configuration.
    pub(crate) disks: Vec<DiskSource>,
    /// For a machine that has a socket device.
    pub(crate) vsock: Option<Arc<VsockEnd>>,
}

impl Attached {
    /// For a VM that prints to `console`.
    pub(crate) fn peripherals(&self, console: Box<dyn Write + Send>) -> io::Result<Peripherals> {
        let vsock = self.vsock.as_ref().map(|end| end.host()).transpose()?;
        Ok(Peripherals {
            console,
            disks: self.disks.iter().map(DiskSource::layer).collect(),
            vsock,
        })
    }
}
