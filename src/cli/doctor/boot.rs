//! A VM that really boots.

use std::sync::Arc;
use std::time::{Duration, Instant};

use forkvm::{BootSpec, ConsoleDevice, End, FamilyConfig, Vm, guest};

use super::Lack;
use crate::cli::said::Said;

/// A host without hardware KVM takes milliseconds, an emulated one seconds.
const DEADLINE: Duration = Duration::from_secs(30);
const MEMORY_MIB: u64 = 64;

/// Boots the embedded guest, has it print its line, and waits for its end.
pub(super) fn hello() -> Result<String, Lack> {
    let said = Said::default();
    let config = FamilyConfig {
        consoles: Arc::new(said.clone()),
        ..FamilyConfig::default()
    };
    let spec = BootSpec {
        name: "doctor".into(),
        memory_mib: MEMORY_MIB,
        vcpus: 1,
        disks: Vec::new(),
        payload: guest::bare(),
        cmdline: "job=hello".into(),
        console: ConsoleDevice::Serial,
    };
    let start = Instant::now();
    let vm = Vm::boot_with(spec, config).map_err(|error| {
        let detail = format!("{:#}", anyhow::Error::from(error));
        Lack::new(detail, "mend what the line above or the text says")
    })?;
    let Some(finished) = vm.member().wait_for(DEADLINE) else {
        vm.kill();
        return Err(Lack::new(
            format!("the guest did not end within {DEADLINE:?}"),
            "look for a KVM problem in the host's kernel log (`dmesg`)",
        ));
    };
    let text = said.text();
    if finished.end != End::Exited(0) || !text.contains("hello") {
        return Err(Lack::new(
            format!("the guest {} and said {text:?}", finished.end),
            "look for a KVM problem in the host's kernel log (`dmesg`)",
        ));
    }
    Ok(format!(
        "a guest of {MEMORY_MIB} MiB booted and ended in {:.0?}",
        start.elapsed()
    ))
}
