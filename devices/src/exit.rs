//! The exit device: by one port write the guest ends its machine with a status.
//!
//! It keeps no state and ends nothing itself: it says [`Effect::Exit`], and the vCPU loop acts on
//! that. QEMU's `isa-debug-exit` sits at the same port and ends QEMU likewise.

use serde::{Deserialize, Serialize};

use crate::device::{Device, DeviceError, Effect};
use crate::section::{SavedState, Section};

/// Length of the only register.
const STATUS_LEN: usize = 4;

/// Ends the machine when the guest writes 32 bits to [`forkvm_abi::EXIT_PORT`].
#[derive(Debug, Default)]
pub struct ExitDevice;

/// Nothing: the section is there so that the device is accounted for.
#[derive(Serialize, Deserialize)]
struct SavedExit {}

impl SavedState for SavedExit {
    const VERSION: u16 = 1;
}

impl Device for ExitDevice {
    fn name(&self) -> &str {
        "exit"
    }

    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        match (offset, <[u8; STATUS_LEN]>::try_from(data)) {
            (0, Ok(status)) => Effect::Exit(u32::from_le_bytes(status)),
            _ => Effect::None,
        }
    }

    fn save(&self) -> Result<Section, DeviceError> {
        Ok(Section::encode("dev/exit", &SavedExit {})?)
    }

    fn restore(&mut self, section: &Section) -> Result<(), DeviceError> {
        let SavedExit {} = section.decode()?;
        Ok(())
    }

    fn activate(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }
}
