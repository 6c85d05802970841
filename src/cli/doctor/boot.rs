//! A VM that really boots.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use forkvm::engine::Consoles;
use forkvm::{BootSpec, End, FamilyConfig, Identity, Vm, guest};

use super::Lack;

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

/// Keeps what the guest says.
#[derive(Clone, Default)]
struct Said(Arc<Mutex<Vec<u8>>>);

impl Said {
    fn text(&self) -> String {
        let bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Consoles for Said {
    fn open(&self, _vm: &Identity) -> io::Result<Box<dyn Write + Send>> {
        Ok(Box::new(self.clone()))
    }
}

impl Write for Said {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
