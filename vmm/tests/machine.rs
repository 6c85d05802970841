//! A machine boots the embedded guest, and goes on in another VM from a saved state.

use std::io::{self, Write};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use forkvm_vmm::boot::Payload;
use forkvm_vmm::{
    EndReason, EventSink, Kvm, MemoryLayout, Peripherals, Ram, ReadyVm, Shell, VmConfig, VmEvent,
};

const LONG: Duration = Duration::from_secs(60);

#[derive(Clone, Default)]
struct Console(Arc<Mutex<Vec<u8>>>);

impl Console {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn boot(memory_mib: u64, vcpus: u32) -> (ReadyVm, Console, Receiver<VmEvent>) {
    let kvm = Arc::new(Kvm::open().unwrap());
    let (tell, told) = channel();
    let events: EventSink = Arc::new(move |event| tell.send(event).unwrap_or_default());
    let console = Console::default();
    let peripherals = Peripherals {
        vsock: None,
        console: Box::new(console.clone()),
        disks: Vec::new(),
    };
    let ram = Ram::new(MemoryLayout::new(memory_mib).unwrap()).unwrap();
    let payload = Payload::Bytes(forkvm_guest_images::BARE);
    let config = VmConfig::new(memory_mib, vcpus);
    let shell = Shell::build(&kvm, vcpus, ram).unwrap();
    let vm = shell
        .boot(config, peripherals, events, &payload, "job=hello")
        .unwrap();
    (vm, console, told)
}

fn exit_status(told: &Receiver<VmEvent>, console: &Console) -> u32 {
    loop {
        match told.recv_timeout(LONG) {
            Ok(VmEvent::Ended(EndReason::Exit(status))) => return status,
            Ok(VmEvent::Ended(other)) => panic!("{other:?}; console:\n{}", console.text()),
            Ok(_) => {}
            Err(_) => panic!("no end; console:\n{}", console.text()),
        }
    }
}

fn boots(memory_mib: u64, vcpus: u32) -> String {
    let (vm, console, told) = boot(memory_mib, vcpus);
    let _running = vm.start();
    assert_eq!(exit_status(&told, &console), 0, "{}", console.text());
    console.text()
}

#[test]
fn the_embedded_guest_boots_on_one_vcpu() {
    println!("{}", boots(64, 1));
}

#[test]
fn the_embedded_guest_starts_all_its_vcpus() {
    println!("{}", boots(64, 4));
}

#[test]
fn the_embedded_guest_sees_ram_beyond_4_gib() {
    println!("{}", boots(6144, 2));
}
