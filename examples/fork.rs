//! Boots a VM, brings it into a state worth keeping, and forks it four times.

use std::time::Duration;

use forkvm::{BootSpec, CloneSpec, ConsoleDevice, End, Error, Vm, guest};

fn main() -> Result<(), Error> {
    let parent = Vm::boot(BootSpec {
        name: "parent".into(),
        memory_mib: 512,
        vcpus: 2,
        disks: Vec::new(),
        payload: guest::bare(),
        cmdline: "job=touch mib=64".into(), // writes 64 MiB, then waits to be forked
        console: ConsoleDevice::Serial,
    })?;
    parent.wait_ready(Duration::from_secs(60))?;
    for clone in parent.fork(CloneSpec::new(4))? {
        let end = clone.join().end; // each clone checks what it inherited
        println!("clone {} {end}", clone.id());
        assert_eq!(end, End::Exited(0));
    }
    Ok(())
}
