//! Exceptions that an instruction which was carried out here raises in the guest.

use kvm_ioctls::VcpuFd;

use crate::vcpu::{StateError, reading, writing};

/// An exception (Intel SDM volume 3, section 6.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// #BP. RIP is after the instruction.
    Breakpoint,
    /// #UD.
    InvalidOpcode,
    /// #GP(0).
    Protection,
    /// #PF.
    Page {
        /// What CR2 gets.
        address: u64,
        /// Its error code (section 4.7).
        code: u32,
    },
}

impl Fault {
    /// Vector and error code.
    fn vector(self) -> (u8, Option<u32>) {
        match self {
            Fault::Breakpoint => (3, None),
            Fault::InvalidOpcode => (6, None),
            Fault::Protection => (13, Some(0)),
            Fault::Page { code, .. } => (14, Some(code)),
        }
    }

    /// Has the vCPU deliver it with its next entry.
    pub(super) fn raise(self, vcpu: &VcpuFd) -> Result<(), StateError> {
        if let Fault::Page { address, .. } = self {
            let mut sregs = vcpu.get_sregs().map_err(reading("SREGS"))?;
            sregs.cr2 = address;
            // What is being delivered is in the events below, not here.
            sregs.interrupt_bitmap = [0; 4];
            vcpu.set_sregs(&sregs).map_err(writing("SREGS"))?;
        }
        let (vector, code) = self.vector();
        let mut events = vcpu.get_vcpu_events().map_err(reading("VCPU_EVENTS"))?;
        events.flags = 0;
        events.exception.injected = 1;
        events.exception.pending = 0;
        events.exception.nr = vector;
        events.exception.has_error_code = u8::from(code.is_some());
        events.exception.error_code = code.unwrap_or(0);
        vcpu.set_vcpu_events(&events)
            .map_err(writing("VCPU_EVENTS"))
    }
}
